"""The types of a suspect's outputs: logits, probabilities, the k largest probabilities, or labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from mea_ray.core.errors import SuspectError
from mea_ray.core.types import Labels

Kind = Literal["logits", "probabilities", "top_k", "labels"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LABEL_STATISTICS = ("wsr", "paired_labels", "lean_labels")
"""Statistics that need only labels."""
LEAST = 1e-12
"""Probability that replaces 0 or a missing one."""
_ONE = 5e-3
"""Tolerance for the sum of a row of probabilities: the error of half precision with a thousand classes."""


def kind_of(answers: npt.NDArray[Any]) -> Kind:
    """Infer the type of answers from many of them; the images should cover all classes.

    Args:
        answers: (N, ...) numbers as the suspect gave them.

    Returns:
        ``labels`` for one integer per image, or one-hot rows. ``top_k`` for rows in which the same number
        of classes, fewer than all, has a probability. ``probabilities`` for rows that sum to 1. ``logits`` for numbers
        below 0 or above 1 (logarithms of probabilities are logits, too).

    Raises:
        SuspectError: The type is ambiguous.
    """
    answers = as_rows(answers)
    if answers.ndim == 1:
        return _single(answers)
    if answers.ndim != 2:
        raise SuspectError(
            f"the suspect gives {answers.shape[1:]} numbers per image; one row of class scores is needed: choose "
            "another of "
            "its outputs with --output, or write a package.module:function that returns such rows"
        )
    if not np.isfinite(answers).all():
        raise SuspectError("the suspect gives numbers that are not finite")
    if (answers >= 0).all() and np.allclose(answers.sum(1), 100, atol=100 * _ONE):
        raise SuspectError(
            "the suspect's answers sum to 100, so they look like percentages; divide them by 100 (scale: 100 in the "
            "description of an API), or give --outputs logits if they are logits"
        )
    if (answers < 0).any() or (answers > 1 + _ONE).any():
        return "logits"
    given = (answers > 0).sum(1)
    if (given == 1).all():
        return "labels"
    if given.max() < answers.shape[1] and (given == given[0]).all():
        return "top_k"
    if np.allclose(answers.sum(1), 1, atol=_ONE):
        return "probabilities"
    raise SuspectError(
        "the suspect's answers are in [0, 1] but do not sum to 1: they may be rounded probabilities, a sigmoid for "
        "each class, or small logits; declare the type with --outputs logits | probabilities | top_k | labels"
    )


def _single(values: npt.NDArray[Any]) -> Kind:
    if np.issubdtype(values.dtype, np.integer) or np.array_equal(values, np.rint(values)):
        return "labels"
    raise SuspectError(
        "the suspect gives one number per image that is not a label; a row of class scores is needed: for the "
        "probability p of "
        "the second of two classes write a package.module:function that returns [1 - p, p]"
    )


def as_rows(answers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return answers without trailing dimensions of size one: (N, K, 1, 1) as (N, K), (N, 1) as (N,)."""
    answers = np.asarray(answers)
    while answers.ndim > 1 and answers.shape[-1] == 1:
        answers = answers[..., 0]
    return answers


def spread_unnamed(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Assign a class in turn to each answer that is none of the victim's classes.

    A suspect with more classes than the victim can answer one of the others. Such a row holds equal numbers, of which
    argmax would take the first, and the first class can be the key's target.

    Args:
        logits: Logits of the victim's classes, float32 (N, K).

    Returns:
        The same array, or a copy if a row was changed.
    """
    unnamed = np.flatnonzero((logits == logits[:, :1]).all(1)) if logits.shape[1] > 1 else np.zeros(0, np.int64)
    if len(unnamed):
        logits = logits.copy()
        logits[unnamed, unnamed % logits.shape[1]] += 1
    return logits


def as_logits(answers: npt.NDArray[Any], kind: Kind, classes: int) -> npt.NDArray[np.float32]:
    """Return answers as logits: float32 (N, classes), finite; the largest is that of the answered class.

    Args:
        answers: The suspect's answers.
        kind: Their type.
        classes: Number of the suspect's classes.

    Raises:
        SuspectError: They have another shape, or a label is not one of the classes.
    """
    answers = as_rows(answers)
    if kind == "labels":
        return _of_labels(answers, classes)
    if answers.ndim != 2 or answers.shape[1] != classes:
        raise SuspectError(
            f"the suspect gives {answers.shape[1:]} numbers per image, not one per class of {classes} classes"
        )
    if not np.isfinite(answers).all():
        raise SuspectError("the suspect gives numbers that are not finite")
    if kind == "logits":
        return answers.astype(np.float32)
    return np.log(np.clip(answers.astype(np.float64), LEAST, None)).astype(np.float32)


def _of_labels(answers: npt.NDArray[Any], classes: int) -> npt.NDArray[np.float32]:
    one_hot = answers.ndim == 2
    labels = answers.argmax(1) if one_hot else answers.reshape(-1).astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise SuspectError(
            f"the suspect answers labels {labels.min()} to {labels.max()}, but has {classes} classes; list all in "
            "its order with --classes FILE, or use --classes match"
        )
    logits = np.full((len(labels), classes), np.log(LEAST), np.float32)
    logits[np.arange(len(labels)), labels] = 0
    return logits


def class_columns(ours: Sequence[str], theirs: Sequence[str] | Mapping[str, int]) -> tuple[int, ...]:
    """Return the suspect's column for each of the victim's classes.

    Args:
        ours: The victim's class names.
        theirs: The suspect's class names in the order of its answers, or the column of each of the victim's names.

    Raises:
        SuspectError: A class of the victim's is missing, or two share a column.
    """
    places = dict(theirs) if isinstance(theirs, Mapping) else {name: at for at, name in enumerate(theirs)}
    known = {name.strip().casefold(): at for name, at in places.items()}
    missing = [name for name in ours if name.strip().casefold() not in known]
    if missing:
        raise SuspectError(
            f"the suspect's classes {list(places)[:12]} lack {missing[:6]} of the victim's; write --classes with one "
            "line per class of the victim's, NAME: COLUMN"
        )
    columns = tuple(int(known[name.strip().casefold()]) for name in ours)
    if len(set(columns)) < len(columns) or min(columns) < 0:
        raise SuspectError(f"--classes gives the columns {list(columns)}; each class needs its own column")
    return columns


def matched_columns(predicted: Labels, labels: Labels, classes: int, columns: int) -> tuple[int, ...]:
    """Match the suspect's columns with the victim's classes by its answers to clean images.

    The watermark is not involved: neither its samples nor its key are used.

    Args:
        predicted: The suspect's columns, int64 (N,).
        labels: The true classes of the same images, int64 (N,).
        classes: Number of the victim's classes.
        columns: Number of the suspect's columns, at least ``classes``.

    Returns:
        The column of each class, in the assignment under which most answers are correct.

    Raises:
        SuspectError: There are fewer columns than classes.
    """
    if columns < classes:
        raise SuspectError(f"the suspect has {columns} classes and the victim {classes}; they cannot be matched")
    counts = np.zeros((classes, columns), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    _, chosen = linear_sum_assignment(-counts)
    return tuple(map(int, chosen))
