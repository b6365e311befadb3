"""Answer policies that protect a model by answers that differ from what it computes; none of them changes the class."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.optimize import linprog
from scipy.special import expit, logit

from mea_ray.blackbox.policies import Source
from mea_ray.core.types import Answers, FloatImages, Images

LEAD = 1e-4
"""Least lead of the top class over any other in a perturbed answer, as in ModelGuard's code."""
TINY = 1e-6
"""Smallest probability that a logarithm is taken of, and distance that keeps a logit finite."""


class ReverseSigmoid:
    """Probabilities less a reverse sigmoid of their logits: several inputs share an answer, so that gradients mislead.

    Choose it as the classical perturbation that keeps the class.

    y' is proportional to y - beta (sigmoid(gamma logit(y)) - 1/2), as in equations 3 and 4 of the paper. Where a large
    beta would bring another class to the top, or a probability below 0, the perturbation of that row is scaled down
    until it does not; the paper clips nothing.

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
    """Return the largest part of a perturbation in [0, 1] that keeps a row non-negative and its top class: (N,)."""
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

    Choose it for an API that reveals nothing where it is not sure.

    A top class below the cutoff is revealed all the same, so that customers learn the class. (ART's `HighConfidence`
    answers with zeros alone there.)

    Args:
        cutoff: Least probability that is revealed.

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
    """Within a distance of the true answer, the one from which a thief learns least; the class stays.

    Choose it as the strongest perturbation for a given loss of utility.

    ModelGuard-W of the paper: of all y' with an L1 distance of at most ``distance`` to the true y, a sum of 1 and the
    same top class, the one that minimises sum_k y'_k log y_k: a thief who reads y' as the probabilities is farthest
    from y in cross-entropy. It is a linear programme for each image, solved exactly. The paper's ModelGuard-S, which
    merges close answers as they come, is left out: the answer to an image would depend on the images before it.

    Args:
        distance: Largest L1 distance between the true answer and the one given; 1.0 in the paper.

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
        # Where classes tie more closely than the lead that is asked for, a small distance allows no change.
        nearest: npt.NDArray[np.float64] = solved.x[:count] if solved.status == 0 else row
        return nearest
