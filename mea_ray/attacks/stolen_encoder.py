"""StolenEncoder: the substitute gives an image's embedding for the image and for augmented views of it."""

from __future__ import annotations

from torch import Tensor, nn

from mea_ray.attacks.imitation import Distance, EncoderAttack, Imitate, distance
from mea_ray.attacks.learning import Learning
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Answers
from mea_ray.training.objective import Batch
from mea_ray.training.views import Views


class StolenEncoder(EncoderAttack):
    """Train substitutes on d(f(x), e(x)) + augmentation_weight * mean over the views d(f(view), e(x)).

    e(x), the victim's embedding of the image as it is, was answered once; views cost no query. Embeddings and features
    are brought to length 1. Losses are means over the batch, where the authors' code sums: a matter of the learning
    rate. Views are flips, colour jitter and greyscale, without a crop, as in the authors' code.

    Args:
        distance: ``l2`` (Euclidean, not squared), ``l1`` or ``cosine``.
        augmentation_weight: Weight of the second term (lambda); 0 leaves it out, as the script of the authors does.
        views: Augmented views per image and step.
        flip: Probability that a view is mirrored; 0 where left and right matter (digits).
        query_chunk: Images in a query.

    References:
        Liu et al., StolenEncoder, CCS 2022, https://arxiv.org/abs/2201.05889, equations 3 to 5.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    overrides = {"augment": ()}

    def __init__(
        self,
        *,
        distance: Distance = "l2",
        augmentation_weight: float = 20.0,
        views: int = 1,
        flip: float = 0.5,
        query_chunk: int = 1024,
    ) -> None:
        for name, count in (("query_chunk", query_chunk), ("views", views)):
            if count < 1:
                raise ConfigError(f"{name}={count} must be at least 1")
        if not 0 <= augmentation_weight < float("inf"):
            raise ConfigError(f"augmentation_weight={augmentation_weight} must be finite and at least 0")
        if distance not in {"l2", "l1", "cosine"}:
            raise ConfigError(f"distance={distance!r} must be l2, l1 or cosine")
        self.distance, self.augmentation_weight, self.views = distance, augmentation_weight, views
        self.make_view = Views(crop_scale=(1.0, 1.0), flip=flip)
        self.query_chunk = query_chunk

    def objective(self, learning: Learning, answers: Answers) -> ImitateViews:
        """Return the loss, see the base class."""
        views = self.views if self.augmentation_weight else 0
        return ImitateViews(answers, self.distance, self.augmentation_weight, views, self.make_view)


class ImitateViews(Imitate):
    """``StolenEncoder``'s loss.

    Args:
        answers: float32 (N, D).
        kind: Distance.
        weight: Of the views' term.
        views: Per image; 0 leaves out the term.
        make_view: How a view is made.
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
            terms["views"] = sum(distance(each, targets, self.kind) for each in augmented) / len(augmented)  # type: ignore[assignment]
        return terms
