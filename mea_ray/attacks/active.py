"""Extraction with active learning: rounds of train, select and query (ActiveThief)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.spatial.distance import cdist

from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.evaluation import metrics
from mea_ray.training import device as devices

Selection = Literal["random", "uncertainty", "k_center", "uncertainty_k_center"]
Rows = npt.NDArray[np.floating[Any]]
Count = Annotated[int, Field(ge=1)]

PAIRS_AT_ONCE = 2**22
"""Distances between candidates and centres in memory at once: 32 MiB."""


class Active(QueryAttack):
    """Query some images at random, then rounds of images that a fresh substitute selects.

    Choose it to get more from a small budget.

    A round trains a substitute from new weights on all answers so far, lets it predict the images that were not queried
    yet, and queries ``round_images`` of them, the best first. The last round is cut by the budget, or by the end of the
    pool. ``random`` trains nothing and queries what distillation queries under the same seed.

    Args:
        selection: ``uncertainty``: largest entropy of the substitute's prediction. ``k_center``: farthest first, in
            Euclidean distance between predictions: an image whose prediction by the substitute lies farthest from the
            victim's answers to all queried images, and from the substitute's predictions of those selected before it.
            ``uncertainty_k_center``: the most uncertain images first, and k-center among these. ``random``: baseline.
        initial: Images queried at random before the first round, whatever the budget.
        round_images: Images queried in a round.
        round_epochs: Epochs that the substitute of a round is trained; null takes those of ``thief.training``.
        candidates: Images considered in a round, drawn uniformly from those not queried yet; null considers all.
        shortlist: Uncertain images that ``uncertainty_k_center`` passes on, as a multiple of ``round_images``.
        query_chunk: Images in a query; its answers are on the disk before the next is sent.

    References:
        Pal et al., ActiveThief: Model Extraction Using Active Learning and Unannotated Public Data, AAAI 2020. Greedy
        k-center: Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, 2018,
        https://arxiv.org/abs/1708.00489, algorithm 1. The paper puts k-center behind DeepFool's distance, not entropy.

    Raises:
        ConfigError: There are fewer candidates than images in a round.
    """

    def __init__(
        self,
        *,
        selection: Selection = "k_center",
        initial: Count = 1000,
        round_images: Count = 1000,
        round_epochs: Count | None = None,
        candidates: Count | None = 20_000,
        shortlist: Annotated[float, Field(ge=1)] = 4.0,
        query_chunk: Count = 1024,
    ) -> None:
        if candidates is not None and candidates < round_images:
            raise ConfigError(f"candidates={candidates} must be at least round_images={round_images}, or null")
        self.selection, self.initial, self.round_images = selection, initial, round_images
        self.round_epochs, self.candidates, self.shortlist = round_epochs, candidates, shortlist
        self.query_chunk = query_chunk

    def first_training(self, pool_size: int, budgets: Sequence[int]) -> int:
        """Return the number of initial images, if rounds follow; see ``QueryAttack.first_training``."""
        has_rounds = self.selection != "random" and self.initial < min(budgets[-1], pool_size)
        return self.initial if has_rounds else budgets[0]

    def queries(self, thief: Thief) -> Queries:
        """Query the initial images, then those of each round, until the pool is exhausted."""
        order = thief.random_order()
        unqueried = order[self.initial :]
        yield order[: self.initial]
        number = 0
        while len(unqueried):
            chosen = self._select(thief, unqueried, number)
            yield unqueried[chosen]
            unqueried = np.delete(unqueried, chosen)
            number += 1

    def _select(self, thief: Thief, unqueried: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
        """Return positions in ``unqueried``, int64, the best first."""
        if self.selection == "random":
            return np.arange(min(self.round_images, len(unqueried)))
        images, answers = thief.training_set()
        overrides: dict[str, Any] = {} if self.round_epochs is None else {"epochs": self.round_epochs}
        # Shuffled, because ties go to the first.
        candidates = numpy_generator(thief.seed, "candidates", number).permutation(len(unqueried))[: self.candidates]
        model = thief.new_model("round", number)
        with devices.exact():
            thief.fit(model, images, answers, "round", number, **overrides)
            predictions = metrics.probabilities(model, thief.pool[unqueried[candidates]])
        return candidates[self.recommend(predictions, answers)]

    def recommend(self, predictions: Rows, answers: Rows) -> npt.NDArray[np.int64]:
        """Select ``round_images`` candidates, or all if there are fewer.

        Args:
            predictions: The substitute's probabilities of the candidates, (N, classes).
            answers: The victim's answers to all queried images, (M, classes).

        Returns:
            Positions in ``predictions``, int64, the best first. Ties go to the first.
        """
        count = min(self.round_images, len(predictions))
        if self.selection == "k_center":
            return k_center(predictions, answers, count)
        uncertain = np.argsort(-entropy(predictions), kind="stable")
        if self.selection == "uncertainty":
            return uncertain[:count]
        passed = uncertain[: max(count, round(self.shortlist * self.round_images))]
        return passed[k_center(predictions[passed], answers, count)]


def entropy(probabilities: Rows) -> npt.NDArray[np.float64]:
    """Return Shannon's entropy of each row, in nats: float64, (N,); 0 * log(0) is 0."""
    rows = probabilities.astype(np.float64)
    result: npt.NDArray[np.float64] = -(rows * np.log(np.where(rows > 0, rows, 1))).sum(1)
    return result


def k_center(points: Rows, centres: Rows, count: int) -> npt.NDArray[np.int64]:
    """Choose points greedily, each the farthest from all centres and the points before it.

    The largest distance that then remains between a point and its nearest centre is at most twice the smallest that any
    choice of ``count`` points leaves (Gonzalez, 1985).

    Args:
        points: (N, d).
        centres: Existing centres, (M, d), M >= 1.
        count: Points to choose, at most N.

    Returns:
        Positions in ``points``, int64, (count,), in the order of choice; ties go to the first.
    """
    rows, old = points.astype(np.float64), centres.astype(np.float64)
    nearest = np.full(len(rows), np.inf)
    block = max(1, PAIRS_AT_ONCE // max(len(rows), 1))
    for start in range(0, len(old), block):
        nearest = np.minimum(nearest, cdist(rows, old[start : start + block], "sqeuclidean").min(1))
    chosen = np.empty(count, np.int64)
    for place in range(count):
        chosen[place] = pick = int(nearest.argmax())
        nearest = np.minimum(nearest, ((rows - rows[pick]) ** 2).sum(1))
        # Never chosen again, even if all remaining points lie on a centre.
        nearest[chosen[: place + 1]] = -np.inf
    return chosen
