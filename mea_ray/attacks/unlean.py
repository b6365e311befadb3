"""A thief's defence against watermarks in soft answers: undo the lean of classes towards others.

The thief sees the lean in the answers that it paid for (``evaluation.leaning``), and needs no further query.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mea_ray.core.types import Answers
from mea_ray.evaluation.leaning import leaning_pairs


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
