"""CloudLeak: images are moved towards another class in a substitute's features; the uncertain ones are queried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy.optimize import minimize
from scipy.spatial.distance import pdist
from torch import Tensor

from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Images, Labels
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.training import device as devices

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
MOST_OF_A_CLASS = 200
"""Most images of a class whose distances make its margin."""


class CloudLeak(QueryAttack):
    """Query images moved towards another class in a substitute's features, the most uncertain first.

    Choose it for a small pool, to query near the victim's decision boundaries.

    A round trains a substitute from new weights on all answers so far. Each of ``candidates`` images x_s of the pool
    gets a guide x_t that the victim gave another class, and becomes the x in [0, 1] that minimises |x - x_s|^2 +
    ``weight`` max(d(x, x_t) - d(x, x_s) + M, 0), by ``steps`` of L-BFGS. d is the distance of the substitute's
    features, and M = ``margin`` less the mean distance between images of the guide's class. Changes of a pixel beyond
    ``largest`` are cut. Of these, the ``round_images`` with the least certain predictions are queried.

    Only the paper's abstract and a description of its loss and constants were at hand (20 steps, 8/255, 1,000 initial
    images). One L-BFGS-B minimises the sum over a chunk of images; the paper's transfer from a network that was
    pretrained on the same domain is left out, and ``weight`` and ``margin`` are this project's.

    Args:
        initial: Images of the pool queried before the first round, whatever the budget.
        round_images: Images queried in a round.
        round_epochs: Epochs that the substitute of a round is trained; null takes those of ``thief.training``.
        candidates: Adversarial images made in a round, at least ``round_images``; fewer if the pool is smaller.
        weight: Weight of the hinge.
        margin: Margin of the hinge, in units of feature distance, before the mean distance within the class is
            subtracted.
        steps: Iterations of L-BFGS.
        largest: Largest change of a pixel, in units of [0, 1].
        query_chunk: Images in a query; the answers of one are on the disk before the next is sent.

    References:
        Yu et al., CloudLeak: Large-Scale Deep Learning Models Stealing Through Adversarial Examples, NDSS 2020.
    """

    needs_features = True

    def __init__(
        self,
        *,
        initial: Count = 1000,
        round_images: Count = 1000,
        round_epochs: Count | None = None,
        candidates: Count = 2000,
        weight: Positive = 1.0,
        margin: Positive = 0.5,
        steps: Count = 20,
        largest: Annotated[float, Field(ge=1 / 255, le=1)] = 8 / 255,
        query_chunk: Count = 1024,
    ) -> None:
        self.initial, self.round_images, self.round_epochs = initial, round_images, round_epochs
        self.candidates, self.weight, self.margin = max(candidates, round_images), weight, margin
        self.steps, self.largest, self.query_chunk = steps, largest, query_chunk

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return the initial images, or the largest budget if that is less: all others are made."""
        return min(self.initial, max(budgets))

    def first_training(self, pool_size: int, budgets: Sequence[int]) -> int:
        """Return the number of initial images; see ``QueryAttack.first_training``."""
        return min(self.initial, budgets[-1])

    def queries(self, thief: Thief) -> Queries:
        """Query the initial images, then those of each round, without end."""
        guides = thief.random_order()[: self.initial]
        answered = (yield guides).argmax(1)
        number = 0
        while True:
            model = self._substitute(thief, number)
            made = self._made(thief, model, thief.pool[guides], answered, number)
            doubt = metrics.probabilities(model, made).max(1)
            yield made[np.argsort(doubt, kind="stable")[: self.round_images]]
            number += 1

    def _substitute(self, thief: Thief, number: int) -> ImageModel:
        images, answers = thief.training_set()
        changes: dict[str, Any] = {} if self.round_epochs is None else {"epochs": self.round_epochs}
        model = thief.new_model("round", number)
        with devices.exact():
            thief.fit(model, images, answers, "round", number, **changes)
        assert isinstance(model, ImageModel)
        return model

    def _made(self, thief: Thief, model: ImageModel, guides: Images, labels: Labels, number: int) -> Images:
        """Return the adversarial images of a round, uint8."""
        generator = numpy_generator(thief.seed, "sources", number)
        sources = thief.pool[generator.permutation(len(thief.pool))[: self.candidates]]
        predicted = metrics.predictions(model, sources)
        # Of another class than the source seems to be, if any guide is.
        apart = labels[None] != predicted[:, None]
        apart[~apart.any(1)] = True
        chosen = np.array([generator.choice(np.flatnonzero(row)) for row in apart])
        own = margins(metrics.features(model, guides), labels, thief.classes, self.margin)
        margin = own[labels[chosen]]
        chunk = self.query_chunk
        return np.concatenate(
            [
                feature_fool(
                    model,
                    sources[start : start + chunk],
                    guides[chosen[start : start + chunk]],
                    margin[start : start + chunk],
                    weight=self.weight,
                    steps=self.steps,
                    largest=self.largest,
                )
                for start in range(0, len(sources), chunk)
            ]
        )


def margins(features: npt.NDArray[np.float32], labels: Labels, classes: int, margin: float) -> npt.NDArray[np.float64]:
    """Return ``margin`` less the mean distance between images of a class, for each class: float64 (classes,).

    A class of fewer than two images has the margin itself.
    """
    of_class = np.full(classes, margin)
    for label in range(classes):
        own = features[labels == label][:MOST_OF_A_CLASS]
        if len(own) > 1:
            of_class[label] -= float(pdist(own.astype(np.float64)).mean())
    return of_class


def fooling_loss(
    x: Tensor, sources: Tensor, features: Tensor, own: Tensor, guide: Tensor, margin: Tensor, weight: float
) -> Tensor:
    """Return |x - x_s|^2 + weight max(d(x, x_t) - d(x, x_s) + M, 0), summed over the images: a scalar.

    Args:
        x: Images, (N, C, H, W).
        sources: x_s, of that shape.
        features: Of x, (N, d).
        own: Of x_s, (N, d).
        guide: Of x_t, (N, d).
        margin: M, (N,).
        weight: See ``CloudLeak``.
    """
    # A distance of 0 has no gradient: x begins at x_s.
    near, far = ((features - other).square().sum(1).clamp_min(1e-12).sqrt() for other in (guide, own))
    return (x - sources).square().sum() + weight * (near - far + margin).clamp_min(0).sum()


def feature_fool(
    model: ImageModel,
    sources: Images,
    guides: Images,
    margin: npt.NDArray[np.float64],
    *,
    weight: float,
    steps: int,
    largest: float,
) -> Images:
    """Move images towards their guides in a network's features, see ``CloudLeak``: uint8 (N, C, H, W).

    Args:
        model: The substitute; moved to the device of this process, in eval mode.
        sources: uint8 (N, C, H, W).
        guides: uint8 (N, C, H, W).
        margin: float64 (N,).
        weight: Weight of the hinge.
        steps: Iterations of L-BFGS-B.
        largest: Largest change of a pixel, in units of [0, 1].
    """
    where = devices.device()
    model.to(where).eval()
    begin = torch.from_numpy(sources).to(where).float() / 255
    limits = torch.from_numpy(margin).to(where).float()
    with devices.exact(), torch.no_grad():
        own, guide = model.features(begin), model.features(torch.from_numpy(guides).to(where).float() / 255)

    def value(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        x = torch.from_numpy(flat.astype(np.float32)).to(where).view_as(begin).requires_grad_()
        loss = fooling_loss(x, begin, model.features(x), own, guide, limits, weight)
        (gradient,) = torch.autograd.grad(loss, x)
        return float(loss.detach()), gradient.cpu().numpy().astype(np.float64).ravel()

    start = begin.cpu().numpy().astype(np.float64).ravel()
    low, high = np.maximum(start - largest, 0), np.minimum(start + largest, 1)
    with devices.exact(), torch.enable_grad():
        solution = minimize(
            value, start, jac=True, method="L-BFGS-B", bounds=np.stack([low, high], 1), options={"maxiter": steps}
        ).x
    moved: Images = np.rint(255 * solution).clip(0, 255).astype(np.uint8).reshape(sources.shape)
    return moved
