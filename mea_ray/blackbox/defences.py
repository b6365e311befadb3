"""Answer policies that defend a model by perturbing its answers; none of them changes the top class."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.optimize import linprog
from scipy.special import expit, logit

from mea_ray.blackbox.policies import Source
from mea_ray.core.errors import DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers, FloatImages, Images

LEAD = 1e-4
"""Minimum lead of the top class over any other in a perturbed answer, as in ModelGuard's code."""
TINY = 1e-6
"""Lower bound of probabilities before taking logarithms; also keeps logits finite."""


class ReverseSigmoid:
    """Probabilities less a reverse sigmoid of their logits: several inputs share an answer, so that gradients mislead.

    Choose it as the classical perturbation that keeps the class.

    y' is proportional to y - beta (sigmoid(gamma logit(y)) - 1/2), as in equations 3 and 4 of the paper. If a large
    beta would change the top class or make a probability negative, the perturbation of that row is scaled down until it
    does not; the paper does not clip.

    Args:
        beta: Magnitude of the perturbation.
        gamma: How fast the perturbation grows away from 1/2.

    References:
        Lee, Edwards, Molloy and Su, Defending Against Neural Network Model Stealing Attacks Using Deceptive
        Perturbations, 2019, https://arxiv.org/abs/1806.00054.
    """

    source: Source = "probabilities"

    def __init__(
        self, *, beta: Annotated[float, Field(gt=0)] = 0.7, gamma: Annotated[float, Field(gt=0)] = 0.2
    ) -> None:
        self.beta, self.gamma = beta, gamma

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Perturb each row, see `AnswerPolicy.apply`."""
        rows = probabilities.astype(np.float64)
        turned = self.beta * (expit(self.gamma * logit(np.clip(rows, TINY, 1 - TINY))) - 0.5)
        changed = rows - _mildest(rows, turned)[:, None] * turned
        answers: Answers = (changed / changed.sum(axis=1, keepdims=True)).astype(np.float32)
        return answers


def _mildest(rows: npt.NDArray[np.float64], turned: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the largest scale in [0, 1] of a perturbation that keeps a row non-negative and its top class: (N,)."""
    places = np.arange(len(rows))
    top = rows.argmax(1)
    lead, lost = rows[places, top][:, None] - rows, turned[places, top][:, None] - turned
    with np.errstate(divide="ignore", invalid="ignore"):
        by_top = np.where(lost > 0, np.maximum(lead - LEAD, 0) / lost, 1.0)
        by_sign = np.where(turned > 0, rows / turned, 1.0)
    by_top[places, top] = 1.0
    distance: npt.NDArray[np.float64] = np.minimum(np.minimum(by_top, by_sign).min(1), 1.0)
    return distance


class HighConfidence:
    """Only probabilities of at least a cutoff, and the top class; all others are zero.

    Choose it for an API that reveals nothing when it is uncertain.

    A top class below the cutoff is still revealed, so that customers get the class. (ART's `HighConfidence`
    answers with zeros alone there.)

    Args:
        cutoff: Minimum probability that is revealed.

    References:
        Tramèr, Zhang, Juels, Reiter and Ristenpart, Stealing Machine Learning Models via Prediction APIs, USENIX
        Security 2016, section 7 (omitting confidence values).
    """

    source: Source = "probabilities"

    def __init__(self, *, cutoff: Annotated[float, Field(gt=0, le=1)] = 0.1) -> None:
        self.cutoff = cutoff

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Hide small probabilities, see `AnswerPolicy.apply`."""
        visible = probabilities >= self.cutoff
        visible[np.arange(len(visible)), probabilities.argmax(axis=1)] = True
        return np.where(visible, probabilities, np.float32(0)).astype(np.float32)


class ModelGuard:
    """Within a distance of the true answer, the one from which a thief learns least; the class is unchanged.

    Choose it as the strongest perturbation for a given loss of utility.

    ModelGuard-W of the paper: of all y' with an L1 distance of at most ``distance`` to the true y, a sum of 1 and the
    same top class, the one that minimises sum_k y'_k log y_k: a thief who reads y' as the probabilities is farthest
    from y in cross-entropy. It is a linear programme for each image, solved exactly.

    Args:
        distance: Maximum L1 distance between the true and the perturbed answer; 1.0 in the paper.

    References:
        Tang et al., ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks, USENIX Security 2024,
        and the code at https://github.com/Yoruko-Tang/ModelGuard.
    """

    source: Source = "probabilities"

    def __init__(self, *, distance: Annotated[float, Field(gt=0, le=2)] = 1.0) -> None:
        self.distance = distance

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Perturb each row, see `AnswerPolicy.apply`."""
        return np.stack([self._farthest(row) for row in probabilities.astype(np.float64)]).astype(np.float32)

    def _farthest(self, row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Solve the linear programme over y' and the distances |y' - y| of each class: float64 (K,)."""
        count, top = len(row), int(row.argmax())
        one, none = np.eye(count), np.zeros((count, count))
        rivals = np.delete(one, top, axis=0)
        rivals[:, top] -= 1.0  # y'_k - y'_top <= -LEAD
        limits = [
            (np.hstack([one, -one]), row),
            (np.hstack([-one, -one]), -row),
            (np.hstack([np.zeros((1, count)), np.ones((1, count))]), np.array([self.distance])),
            (np.hstack([rivals, none[1:]]), np.full(count - 1, -LEAD)),
        ]
        solved = linprog(
            np.concatenate([np.log(row + TINY), np.zeros(count)]),
            A_ub=np.vstack([left for left, _ in limits]),
            b_ub=np.concatenate([right for _, right in limits]),
            A_eq=np.concatenate([np.ones(count), np.zeros(count)])[None],
            b_eq=[1.0],
            bounds=(0, 1),
            method="highs",
        )
        # If classes are closer than the required lead, a small distance permits no change.
        nearest: npt.NDArray[np.float64] = solved.x[:count] if solved.status == 0 else row
        return nearest


class ModelGuardS:
    """Answers are quantised: close answers become equal, so that they tell a thief less.

    Choose it like model_guard, against thieves who undo perturbations: quantisation cannot be undone.

    ModelGuard-S of the paper. An answer is replaced by the first of a list of answers with its top class that lies
    within an L1 distance of ``distance``. The list is made from the victim's answers to images of its training set, in
    a random order: an answer is added unless an earlier one is close to it.

    The authors' code also gives the first answer within the distance. But there, a query without a close answer extends
    the list, so that answers depend on all earlier clients. Here the list is fixed before the first query, and such a
    query gets the true answer. So the answer to an image is always the same, on every replica and after a restart.
    (With a fixed list, the authors' code gives the nearest answer, at any distance.)

    Args:
        distance: Largest L1 distance between the true answer and the one given; 1.0 in the authors' code.
        fitted: Maximum number of images of the victim's training set from which the list is made.
        seed: Seed of the choice of these images and their order.

    References:
        Tang et al., ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks, USENIX Security 2024,
        and ``ordered_quantize`` in the code at https://github.com/Yoruko-Tang/ModelGuard.
    """

    source: Source = "probabilities"
    fits_on: Literal["features", "probabilities", "pixels"] = "probabilities"

    def __init__(
        self,
        *,
        distance: Annotated[float, Field(gt=0, le=2)] = 1.0,
        fitted: Annotated[int, Field(ge=1)] = 5000,
        seed: int = 0,
    ) -> None:
        self.distance, self.fitted, self.seed = distance, fitted, seed
        self._lists: dict[int, npt.NDArray[np.float32]] | None = None

    def choose(self, clean: Images) -> Images:
        """Choose the images to fit on among the owner's training images, uint8 (N, C, H, W)."""
        return clean[numpy_generator(self.seed, "fitted").permutation(len(clean))[: self.fitted]]

    def fit(self, clean: npt.NDArray[np.float32]) -> None:
        """Make the list from the victim's probabilities on the chosen images, float32 (N, K), in their order."""
        lists: dict[int, npt.NDArray[np.float32]] = {}
        for row in clean:
            top = int(row.argmax())
            known = lists.get(top, np.empty((0, len(row)), np.float32))
            if not self._close(known, row).any():
                lists[top] = np.concatenate([known, row[None]])
        self._lists = lists

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Quantise each row, see `AnswerPolicy.apply`.

        Raises:
            DataError: ``fit`` was not called.
        """
        if self._lists is None:
            raise DataError("the answer policy model_guard_s is not fitted; call fit before it answers")
        answers = np.array(probabilities, dtype=np.float32)
        for answer in answers:
            known = self._lists.get(int(answer.argmax()))
            if known is not None and (close := self._close(known, answer)).any():
                answer[:] = known[close.argmax()]
        return answers

    def _close(self, known: npt.NDArray[np.float32], row: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        within: npt.NDArray[np.bool_] = np.abs(known.astype(np.float64) - row).sum(1) <= self.distance
        return within
