"""StolenEncoder: the substitute gives an image's embedding for the image and for augmented views of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from mea_ray.attacks.encoder_attack import Distance, EmbeddingObjective, EncoderAttack, distance
from mea_ray.attacks.learning import Learning
from mea_ray.core.types import Answers
from mea_ray.training.objective import Batch
from mea_ray.training.views import Probability, Views


class StolenEncoder(EncoderAttack):
    """Train substitutes on d(f(x), e(x)) + augmentation_weight * mean over the views d(f(view), e(x)).

    Choose it against an encoder, to use augmented views that cost no query.

    e(x) is the victim's embedding of the unaugmented image, queried once; views cost no query. Embeddings and features
    are scaled to length 1. Losses are means over the batch, where the authors' code has sums; this only rescales the
    gradient. Views are flips, colour jitter and greyscale, without a crop, as in the authors' code.

    Args:
        distance: ``l2`` (Euclidean, not squared), ``l1`` or ``cosine``.
        augmentation_weight: Weight of the second term (lambda); 0 leaves it out, as the authors' script does.
        views: Augmented views per image and step.
        flip: Probability that a view is mirrored; 0 where left and right matter (digits).
        query_chunk: Images in a query.

    References:
        Liu et al., StolenEncoder, CCS 2022, https://arxiv.org/abs/2201.05889, equations 3 to 5.
    """

    training_overrides = {"augment": ()}

    def __init__(
        self,
        *,
        distance: Distance = "l2",
        augmentation_weight: Annotated[float, Field(ge=0)] = 20.0,
        views: Annotated[int, Field(ge=1)] = 1,
        flip: Probability = 0.5,
        query_chunk: Annotated[int, Field(ge=1)] = 1024,
    ) -> None:
        self.distance, self.augmentation_weight, self.views = distance, augmentation_weight, views
        self.make_view = Views(crop_scale=(1.0, 1.0), flip=flip)
        self.query_chunk = query_chunk

    def objective(self, learning: Learning, answers: Answers) -> ViewsObjective:
        """Return the loss, see the base class."""
        views = self.views if self.augmentation_weight else 0
        return ViewsObjective(answers, self.distance, self.augmentation_weight, views, self.make_view)


class ViewsObjective(EmbeddingObjective):
    """The loss of ``StolenEncoder``.

    Args:
        answers: float32 (N, D).
        kind: Distance.
        weight: Weight of the views' term.
        views: Views per image; 0 leaves out the term.
        make_view: Augments a batch.
    """

    def __init__(self, answers: Answers, kind: Distance, weight: float, views: int, make_view: Views) -> None:
        super().__init__(answers, normalise=True)
        self.kind, self.count, self.make_view = kind, views, make_view
        self.weights = {"views": weight}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``images``, and ``views`` before its weight."""
        views = [self.make_view(batch.images, self.context.generator) for _ in range(self.count)]
        targets = self.targets[batch.indices]
        plain, *augmented = self.embed(model, [batch.images, *views])
        terms = {"images": distance(plain, targets, self.kind)}
        if augmented:
            total = distance(augmented[0], targets, self.kind)
            for each in augmented[1:]:
                total = total + distance(each, targets, self.kind)
            terms["views"] = total / len(augmented)
        return terms
