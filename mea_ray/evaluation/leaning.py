"""Classes whose answers lean to another class, which anybody can tell from the soft answers of a query API.

A watermark that travels through a query API must be in its answers. Schemes that mix classes leave a trace there: the
answers to a source class give the target class a constant part of the probability, far more than confusion between
classes explains. A thief removes it (``attacks.unlean``); an outsider reads the key from it (``detection.leaning``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from mea_ray.core.types import Answers

SIGNIFICANCE = 0.01
"""Probability that any pair of classes is named although second places fall at random."""
LEAN_FACTOR = 1.5
"""How much more than 1 / K the median answer must give a class: confusion between digits stays below 0.5 / K."""


@dataclass(frozen=True)
class AnsweredClasses:
    """Answers, by the class that they name.

    Attributes:
        counts: Answers that name each class first, int64 (K,).
        seconds: At [a, b] how many of the answers a give b the second place, int64 (K, K).
        means: At [a, b] the mean probability of b in the answers a, float64 (K, K); NaN where a was never answered.
        medians: The same with medians.
    """

    counts: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.int64]
    means: npt.NDArray[np.float64]
    medians: npt.NDArray[np.float64]


def by_answered_class(answers: Answers) -> AnsweredClasses:
    """Sum up answers by the class that they name.

    Args:
        answers: float32 (N, K), probabilities; zeros where the API hides some.
    """
    classes = answers.shape[1]
    predicted = answers.argmax(1)
    means, medians = np.full((2, classes, classes), np.nan)
    seconds = np.zeros((classes, classes), np.int64)
    for label in np.unique(predicted).tolist():
        own = answers[predicted == label].astype(np.float64)
        means[label], medians[label] = own.mean(0), np.median(own, axis=0)
        own[:, label] = -np.inf
        seconds[label] = np.bincount(own.argmax(1), minlength=classes)
    return AnsweredClasses(np.bincount(predicted, minlength=classes), seconds, means, medians)


def leaning_pairs(answers: Answers) -> dict[tuple[int, int], float]:
    """Find the classes whose answers lean to another class.

    Class a leans to class b if, among the images answered a,

    - b comes second more often than chance explains: a one-sided binomial test at 1 / (K - 1), with Bonferroni's
      correction over all K (K - 1) pairs; and
    - half of the answers give b more than 1.5 / K, where an answer without any information would give it 1 / K.

    If a and b lean to each other, only the stronger of the two counts: a target class also resembles its sources.

    Args:
        answers: float32 (N, K), probabilities; zeros where the API hides some.

    Returns:
        The pairs (a, b), each with its lean: the median probability of b among the images answered a.
    """
    classes = answers.shape[1]
    table = by_answered_class(answers)
    leans: dict[tuple[int, int], float] = {}
    for label in np.flatnonzero(table.counts).tolist():
        typical = table.medians[label]
        p_values = binom.sf(table.seconds[label] - 1, table.counts[label], 1 / (classes - 1))
        named = (p_values <= SIGNIFICANCE / (classes * (classes - 1))) & (typical > LEAN_FACTOR / classes)
        leans |= {(label, other): float(typical[other]) for other in np.flatnonzero(named).tolist() if other != label}
    return {(a, b): lean for (a, b), lean in leans.items() if lean >= leans.get((b, a), 0.0)}
