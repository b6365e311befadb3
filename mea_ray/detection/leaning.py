"""The key that an outsider would guess from a few soft answers, knowing the scheme and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mea_ray.core.errors import DataError
from mea_ray.core.types import Answers, Images
from mea_ray.detection.base import Detection, DetectionReport
from mea_ray.evaluation import metrics
from mea_ray.evaluation.leaning import by_answered_class, leaning_pairs
from mea_ray.models.base import ImageModel


@dataclass(frozen=True)
class NamedKey:
    """The key that an outsider would name, and how the true key does by the same score.

    Attributes:
        sources: Its source classes, rising.
        target: Its target.
        score: The mean of p_target over the answers to the sources, each source counting the same, in [0, 1].
        next_score: The largest score of any other key; None if there is no other.
        true_score: Score of the true key; None if that is not known, or if one of its sources was never answered.
        at_least: Other keys whose score is at least that of the true key; all of them if that has no score.
        others: Number of other keys.
    """

    sources: tuple[int, ...]
    target: int
    score: float
    next_score: float | None
    true_score: float | None
    at_least: int
    others: int


def readable(answers: Answers) -> bool:
    """Return whether answers say more than a class: some give two classes a probability above zero."""
    return bool(((answers > 0).sum(1) > 1).any())


def name_key(
    answers: Answers, sources: tuple[int, ...] = (), target: int | None = None, *, source_count: int = 2
) -> NamedKey | None:
    """Name the key that fits some answers best: the largest mean of p_target over all answered sources.

    The keys are all sets of ``source_count`` classes with another class as the target.

    Args:
        answers: float32 (N, K), probabilities; zeros where the API hides some.
        sources: Source classes of the true key; empty if it has none.
        target: Target of the true key; None if it has none.
        source_count: Source classes of a key, 1 or 2; the number of ``sources`` if these are given.

    Returns:
        The key; None where nothing can be read: answers name classes only, or too few classes were answered.

    Raises:
        DataError: A key has more than two source classes.
    """
    count = len(sources) or source_count
    if count not in {1, 2}:
        raise DataError(f"a key of {count} source classes cannot be read from answers; it must have 1 or 2")
    classes = answers.shape[1]
    if not readable(answers):
        return None
    table = by_answered_class(answers)
    known = sources != () and target is not None and target >= 0
    true = float(np.mean([table.means[label, target] for label in sources])) if known else float("nan")
    best: tuple[float, tuple[int, ...], int] | None = None
    next_score, at_least = float("nan"), 0
    for label, keys, scores in _by_target(table.means, count):
        at_least += int((scores >= true).sum())
        for place in np.argsort(-scores, kind="stable")[:2].tolist():
            score = float(scores[place])
            if best is None or score > best[0]:
                next_score = float("nan") if best is None else best[0]
                best = (score, tuple(keys[place].tolist()), label)
            else:
                next_score = float(np.fmax(next_score, score))
    if best is None:
        return None
    others = comb(classes, count) * (classes - count) - 1
    return NamedKey(
        sources=best[1],
        target=best[2],
        score=best[0],
        next_score=None if np.isnan(next_score) else next_score,
        true_score=None if np.isnan(true) else true,
        at_least=others if np.isnan(true) else at_least - 1,  # the true key is as large as itself
        others=others,
    )


def _by_target(
    means: npt.NDArray[np.float64], source_count: int
) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Yield for each target the keys whose sources were answered, int64 (n, source_count), and their scores, (n,)."""
    answered = np.flatnonzero(~np.isnan(means).any(1))
    for target in range(len(means)):
        labels = answered[answered != target]
        if source_count == 1:
            keys = labels[:, None]
        else:
            keys = np.stack([labels[side] for side in np.triu_indices(len(labels), 1)], axis=1)
        if len(keys):
            yield target, keys, means[keys, target].mean(1)


class Leaning(Detection):
    """The key that an outsider would name from the model's soft answers to clean images.

    Choose it to see whether the mark can be read from a stolen model; for the victim it is part of every result.

    Numbers: ``score``, the mean probability of the target on the sources of the key that fits best, and ``next``, that
    of the next key. Flagged are the classes that another class leans to more than chance explains (what
    ``thief.learning.answers=unlean`` removes).

    Args:
        answers: Most answers that are used.
    """

    name = "leaning"

    def __init__(self, *, answers: Annotated[int, Field(ge=1)] = 1000) -> None:
        self.answers = answers

    def inspect(self, model: ImageModel, clean: Images, samples: Images | None, seed: int) -> DetectionReport:
        """Return the classes that others lean to, and the scores of the two best keys."""
        answers = metrics.probabilities(model, clean[: self.answers])
        named = name_key(answers)
        numbers = {} if named is None else {"score": named.score}
        if named is not None and named.next_score is not None:
            numbers["next"] = named.next_score
        return DetectionReport(tuple(sorted({target for _, target in leaning_pairs(answers)})), (), numbers)
