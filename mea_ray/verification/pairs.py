"""Measurements on mixes with known source images: interval, specificity, and ranks of the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mea_ray.core.class_keys import AdmissibleKeys, ClassKey
from mea_ray.core.types import Images, Labels
from mea_ray.verification.intervals import Interval, clustered_interval, difference_p_value
from mea_ray.verification.keys import key_rank, lean_by_key, mean_by_key
from mea_ray.verification.ranks import Rank
from mea_ray.verification.statistic import Scores, label_scores, log_probabilities, paired

PredictLogits = Callable[[Images], npt.NDArray[np.float32]]
"""uint8 images (N, C, H, W) to logits (N, classes)."""
Positions = npt.NDArray[np.int64]
OTHER_CLASSES = "other_classes"


class PairSamples(Protocol):
    """Mixes with their source images, by index in the held-out set; ``watermarks.pairs.MixedPairs`` is one."""

    @property
    def positions(self) -> Positions:
        """Source images of each watermark sample, int64 (n, 2), in the samples' order."""
        ...

    @property
    def otherwise(self) -> Mapping[str, Images]:
        """For each other geometry, the first m pairs mixed that way, uint8 (m, C, H, W), m <= n."""
        ...

    @property
    def every_pair(self) -> Images:
        """Mixes of all ordered pairs of classes in the key's geometry, uint8 (k, C, H, W)."""
        ...

    @property
    def every_otherwise(self) -> Mapping[str, Images]:
        """The same pairs in each other geometry that could have been drawn; empty if the key's was not drawn."""
        ...

    @property
    def every_classes(self) -> Positions:
        """Their source classes, int64 (k, 2)."""
        ...

    @property
    def every_positions(self) -> Positions:
        """Their source images, int64 (k, 2)."""
        ...

    @property
    def clean(self) -> Images:
        """Clean held-out images of all classes, uint8 (c, C, H, W)."""
        ...

    @property
    def clean_labels(self) -> Labels:
        """Their labels, int64 (c,)."""
        ...

    @property
    def source_classes(self) -> tuple[int, int]:
        """The key's source classes."""
        ...

    @property
    def geometry(self) -> str:
        """Name of the key's geometry."""
        ...


@dataclass(frozen=True)
class PairMeasurements:
    """The measurements of one model.

    Attributes:
        wsr: Mean label score of the key's mixes, with an interval over source images.
        statistics: ``paired`` and ``paired_labels``.
        specificity: p-value of each comparison: names of geometries, and ``other_classes`` where there are such mixes.
        key_ranks: Rank of the key by ``wsr``, ``log_probability``, ``lean`` and ``lean_labels``; those on mixes only if
            ``every_pair`` holds all pairs.
    """

    wsr: Interval
    statistics: Mapping[str, float]
    specificity: Mapping[str, float]
    key_ranks: Mapping[str, Rank]


def measure_pairs(
    predict_logits: PredictLogits, own: npt.NDArray[np.floating[Any]], target: int, pairs: PairSamples, seed: int
) -> PairMeasurements:
    """Measure one model on mixes with known source images.

    Args:
        predict_logits: The model.
        own: Its logits of the watermark samples, (n, classes).
        target: The key's target.
        pairs: The mixes.
        seed: Seed of the bootstraps.
    """
    labels, logs = label_scores(own.argmax(1), target), log_probabilities(own)[:, target]
    first, second = pairs.positions.T
    other_labels, other_logs = {}, {}
    specificity = {}
    for name, images in pairs.otherwise.items():
        if len(images):
            logits, part = predict_logits(images), slice(len(images))
            other_labels[name] = label_scores(logits.argmax(1), target)
            other_logs[name] = log_probabilities(logits)[:, target]
            difference = logs[part] - other_logs[name]
            specificity[name] = clustered_interval(difference, [first[part], second[part]], seed=seed).p_not_positive
    every = predict_logits(pairs.every_pair) if len(pairs.every_pair) else np.empty((0, own.shape[1]))
    unnamed = ~np.isin(pairs.every_classes, [*pairs.source_classes, target]).any(1)
    strangers = every[unnamed]
    if len(strangers):
        clusters = list(pairs.every_positions[unnamed].T)
        scores = log_probabilities(strangers)[:, target]
        specificity[OTHER_CLASSES] = difference_p_value(logs, [first, second], scores, clusters, seed=seed)
    statistics = {}
    if specificity:
        statistics = {
            "paired": paired(logs, other_logs, log_probabilities(strangers)[:, target]),
            "paired_labels": paired(labels, other_labels, label_scores(strangers.argmax(1), target)),
        }
    return PairMeasurements(
        wsr=clustered_interval(labels, [first, second], seed=seed),
        statistics=statistics,
        specificity=specificity,
        key_ranks=_ranks_on_clean(predict_logits(pairs.clean), target, pairs)
        | _ranks_on_mixes(predict_logits, every, target, pairs),
    )


def _ranks_on_clean(clean: npt.NDArray[np.floating[Any]], target: int, pairs: PairSamples) -> dict[str, Rank]:
    """Rank the key among all unordered pairs with a target, by statistics of clean images."""
    classes = clean.shape[1]
    admissible, key = AdmissibleKeys(classes), ClassKey(pairs.source_classes, target)
    ranks = {}
    for name, scores in (("lean", log_probabilities(clean)), ("lean_labels", _label_table(clean))):
        by_class = _means(scores, pairs.clean_labels, classes)
        if not np.isnan(by_class).any():
            ranks[name] = key_rank(lean_by_key(by_class, admissible), key, admissible)
    return ranks


def _ranks_on_mixes(
    predict_logits: PredictLogits, every: npt.NDArray[np.floating[Any]], target: int, pairs: PairSamples
) -> dict[str, Rank]:
    """Rank the key among all ordered pairs with a target, and all geometries if its own was drawn."""
    classes = every.shape[1]
    place = pairs.every_classes[:, 0] * classes + pairs.every_classes[:, 1]
    if len(np.unique(place)) < classes * (classes - 1):
        return {}
    answers = {"": every}
    if pairs.every_otherwise:
        answers = {pairs.geometry: every} | {g: predict_logits(mixes) for g, mixes in pairs.every_otherwise.items()}
    admissible = AdmissibleKeys(classes, ordered=True, geometries=tuple(name for name in answers if name))
    key = ClassKey(pairs.source_classes, target, pairs.geometry)
    ranks = {}
    for name, score in (("log_probability", log_probabilities), ("wsr", _label_table)):
        means = {geometry: _means(score(logits), place, classes**2) for geometry, logits in answers.items()}
        by_pair = {
            ((a, b), geometry): of[a * classes + b]
            for geometry, of in means.items()
            for a, b in permutations(range(classes), 2)
        }
        ranks[name] = key_rank(mean_by_key(by_pair, admissible), key, admissible)
    return ranks


def _label_table(logits: npt.NDArray[np.floating[Any]]) -> Scores:
    """Return the predicted classes as rows of zeros with a single one, (N, classes)."""
    rows: Scores = np.eye(logits.shape[1])[logits.argmax(1)]
    return rows


def _means(scores: Scores, groups: npt.NDArray[np.integer[Any]], count: int) -> Scores:
    """Return the mean of the scores of each group, (count, classes); NaN for empty groups."""
    sums = np.zeros((count, scores.shape[1]))
    np.add.at(sums, groups, scores)
    with np.errstate(invalid="ignore"):
        means: Scores = sums / np.bincount(groups, minlength=count)[:, None]
    return means
