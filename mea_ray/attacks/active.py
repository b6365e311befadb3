"""Extraction with active learning: rounds of train, select and query (ActiveThief)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from mea_ray.attacks.driver import Queries, Thief, TransferAttack
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.evaluation import metrics
from mea_ray.training import device as devices

Selection = Literal["random", "uncertainty", "k_center", "uncertainty_k_center"]
Rows = npt.NDArray[np.floating[Any]]

PAIRS_AT_ONCE = 2**22
"""Distances between candidates and centres in memory at once: 32 MiB."""


class Active(TransferAttack):
    """Query some images at random, then in rounds those that a fresh substitute's answers recommend.

    A round trains a substitute from new weights on all answers so far, lets it answer the images that were not asked
    yet, and asks ``round_images`` of them, the most recommended first. The last round is cut by the budget, or by the
    end of the pool. ``random`` trains nothing and asks what distillation asks under the same seed.

    Args:
        selection: ``uncertainty``: largest entropy of the substitute's answer. ``k_center``: farthest first, in
            Euclidean distance between answers: an image whose substitute's answer lies farthest from the victim's
            answers to all that was asked, and from the substitute's to those selected before it.
            ``uncertainty_k_center``: the most uncertain images first, and k-center among these. ``random``: control.
        initial: Images asked at random before the first round, whatever the budget.
        round_images: Images asked in a round.
        round_epochs: Epochs that the substitute of a round is trained; null takes those of ``thief.training``.
        candidates: Images that are considered in a round, drawn evenly from those not asked yet; null considers all.
        shortlist: Uncertain images that ``uncertainty_k_center`` passes on, as a multiple of ``round_images``.
        query_chunk: Images in a query; the answers of one are on the disk before the next is asked.

    References:
        Pal et al., ActiveThief: Model Extraction Using Active Learning and Unannotated Public Data, AAAI 2020. Greedy
        k-center: Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach, 2018,
        https://arxiv.org/abs/1708.00489, algorithm 1. The paper puts k-center behind DeepFool's distance, not entropy.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(
        self,
        *,
        selection: Selection = "k_center",
        initial: int = 1000,
        round_images: int = 1000,
        round_epochs: int | None = None,
        candidates: int | None = 20_000,
        shortlist: float = 4.0,
        query_chunk: int = 1024,
    ) -> None:
        for name, value in (
            ("initial", initial),
            ("round_images", round_images),
            ("round_epochs", round_epochs),
            ("candidates", candidates),
            ("query_chunk", query_chunk),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if shortlist < 1:
            raise ConfigError(f"shortlist={shortlist} must be at least 1: it is a multiple of round_images")
        if candidates is not None and candidates < round_images:
            raise ConfigError(f"candidates={candidates} must be at least round_images={round_images}, or null")
        if selection not in {"random", "uncertainty", "k_center", "uncertainty_k_center"}:
            raise ConfigError(
                f"selection={selection!r} must be one of random, uncertainty, k_center, uncertainty_k_center"
            )
        self.selection, self.initial, self.round_images = selection, initial, round_images
        self.round_epochs, self.candidates, self.shortlist = round_epochs, candidates, shortlist
        self.query_chunk = query_chunk

    def queries(self, thief: Thief) -> Queries:
        """Ask the initial images, then those of each round, until the pool is asked."""
        order = thief.shuffled()
        unasked = order[self.initial :]
        yield thief.from_pool(order[: self.initial])
        number = 0
        while len(unasked):
            chosen = self._select(thief, unasked, number)
            yield thief.from_pool(unasked[chosen])
            unasked = np.delete(unasked, chosen)
            number += 1

    def _select(self, thief: Thief, unasked: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
        """Return positions in ``unasked``, int64, the most recommended first."""
        if self.selection == "random":
            return np.arange(min(self.round_images, len(unasked)))
        images, answers = thief.learnt()
        overrides: dict[str, Any] = {} if self.round_epochs is None else {"epochs": self.round_epochs}
        # Shuffled, for ties are given to the first.
        shown = numpy_generator(thief.seed, "candidates", number).permutation(len(unasked))[: self.candidates]
        model = thief.new_model("round", number)
        with devices.exact():
            thief.fit(model, images, answers, "round", number, **overrides)
            said = metrics.probabilities(model, thief.pool[unasked[shown]])
        return shown[self.recommend(said, answers)]

    def recommend(self, said: Rows, answers: Rows) -> npt.NDArray[np.int64]:
        """Select ``round_images`` candidates, or all if there are fewer.

        Args:
            said: The substitute's probabilities of the candidates, (N, classes).
            answers: The victim's answers to all that was asked, (M, classes).

        Returns:
            Positions in ``said``, int64, the most recommended first. Of equals the first comes first.
        """
        count = min(self.round_images, len(said))
        if self.selection == "k_center":
            return k_center(said, answers, count)
        uncertain = np.argsort(-entropy(said), kind="stable")
        if self.selection == "uncertainty":
            return uncertain[:count]
        passed = uncertain[: max(count, round(self.shortlist * self.round_images))]
        return passed[k_center(said[passed], answers, count)]


def entropy(probabilities: Rows) -> npt.NDArray[np.float64]:
    """Return Shannon's entropy of each row, in nats: float64, (N,); 0 * log(0) is 0."""
    rows = probabilities.astype(np.float64)
    result: npt.NDArray[np.float64] = -(rows * np.log(np.where(rows > 0, rows, 1))).sum(1)
    return result


def k_center(points: Rows, centres: Rows, count: int) -> npt.NDArray[np.int64]:
    """Choose points greedily, each the farthest from all centres and the points before it.

    The radius that is left, the largest distance of a point from its nearest centre, is at most twice the least that
    any choice of ``count`` points leaves (Gonzalez, 1985).

    Args:
        points: (N, d).
        centres: Where centres lie already, (M, d), M >= 1.
        count: Points to choose, at most N.

    Returns:
        Positions in ``points``, int64, (count,), in the order of choice; of equally far points the first.
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
        # Not again, even where all that is left lies on a centre.
        nearest[chosen[: place + 1]] = -np.inf
    return chosen
