"""A thief's defence against watermarks in soft answers: find classes whose answers lean to another class, and undo it.

A watermark that travels through a query API must be in its answers. Schemes that mix classes leave a trace there: the
answers to a source class give the target class a constant part of the probability, far more than confusion between
classes explains. The thief sees this in the answers that it paid for, and needs no further query.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from mea_ray.core.types import Answers

SIGNIFICANCE = 0.01
"""Probability that any pair of classes is named although second places fall at random."""
LEAN_FACTOR = 1.5
"""How much more than 1 / K the median answer must give a class: confusion between digits stays below 0.5 / K."""


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
    predicted = answers.argmax(1)
    leans: dict[tuple[int, int], float] = {}
    for label in np.unique(predicted).tolist():
        own = answers[predicted == label].astype(np.float64)
        others = own.copy()
        others[:, label] = -np.inf
        seconds = np.bincount(others.argmax(1), minlength=classes)
        p_values = binom.sf(seconds - 1, len(own), 1 / (classes - 1))
        typical = np.median(own, axis=0)
        named = (p_values <= SIGNIFICANCE / (classes * (classes - 1))) & (typical > LEAN_FACTOR / classes)
        leans |= {(label, other): float(typical[other]) for other in np.flatnonzero(named).tolist() if other != label}
    return {(a, b): lean for (a, b), lean in leans.items() if lean >= leans.get((b, a), 0.0)}


def unlean(answers: Answers) -> Answers:
    """Undo the leaning of classes.

    For each pair (a, b) of ``leaning_pairs``, strongest first:

    - an image answered b that gives a more than the lean is returned to a: the two probabilities are exchanged. Such an
      image resembles a as much as a's own images resemble b; a watermark's gate answers some of them with the target;
    - of each image then answered a, the probability of b is lowered to the mean of the remaining classes, and a gets
      the difference.

    Args:
        answers: float32 (N, K), K >= 2.

    Returns:
        float32 (N, K) with the same row sums, a new array.
    """
    cleaned = answers.astype(np.float64)
    predicted = answers.argmax(1)
    for (source, target), lean in sorted(leaning_pairs(answers).items(), key=lambda item: -item[1]):
        returned = (predicted == target) & (cleaned[:, source] > lean) & _second(cleaned, target, source)
        cleaned[np.ix_(returned, [source, target])] = cleaned[np.ix_(returned, [target, source])]
        predicted = np.where(returned, source, predicted)
        rows = np.flatnonzero(predicted == source)
        background = np.delete(cleaned[rows], [source, target], axis=1).mean(1)
        surplus = np.maximum(cleaned[rows, target] - background, 0)
        cleaned[rows, target] -= surplus
        cleaned[rows, source] += surplus
    return cleaned.astype(np.float32)


def _second(answers: npt.NDArray[np.float64], first: int, second: int) -> npt.NDArray[np.bool_]:
    """Return the rows in which no class but ``first`` has more than ``second``: bool (N,)."""
    others = answers.copy()
    others[:, first] = -np.inf
    rows: npt.NDArray[np.bool_] = others.argmax(1) == second
    return rows
