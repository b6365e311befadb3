"""Measures one model: the watermark in it, and what carrying or stealing the watermark costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images, ImageSet, Labels, Recognise, StatisticName
from mea_ray.evaluation import metrics
from mea_ray.results.records import ModelReport, RankRecord
from mea_ray.verification.intervals import clustered_interval
from mea_ray.verification.pairs import PairSamples, PredictLogits, measure_pairs
from mea_ray.verification.proportions import binomial_p_value, proportion
from mea_ray.verification.ranks import Rank, rank_among
from mea_ray.verification.statistic import label_scores, lean, log_probabilities

Logits = npt.NDArray[np.float32]


class Signal(Protocol):
    """A signal in answers to clean images; ``watermarks.base.KeyedSignal`` is one."""

    @property
    def images(self) -> Images:
        """Clean held-out images, uint8 (n, C, H, W)."""
        ...

    @property
    def scores(self) -> Callable[[Logits], npt.NDArray[np.float64]]:
        """Logits on these, (n, classes), to the owner's key's score and those of drawn keys, (1 + R,)."""
        ...


class FilteredSamples(Protocol):
    """Samples that were chosen before any suspect was known; ``watermarks.chosen_samples.ChosenSamples`` is one."""

    @property
    def images(self) -> Images:
        """The chosen samples, uint8 (n, C, H, W)."""
        ...

    @property
    def positions(self) -> npt.NDArray[np.int64] | None:
        """The two source images of each sample, int64 (n, 2); None for a scheme that mixes no images."""
        ...


class Samples(Protocol):
    """What verification needs of a watermark's held-out samples; ``watermarks.base.WatermarkSamples`` is one."""

    @property
    def images(self) -> Images:
        """Distinct watermark samples, uint8 (n, C, H, W)."""
        ...

    @property
    def target(self) -> int:
        """Label that counts as success."""
        ...

    @property
    def adverse(self) -> Mapping[str, Images]:
        """For each other geometry, the same classes mixed that way."""
        ...

    @property
    def other_classes(self) -> Images | None:
        """Mixes in the watermark's geometry of classes that are not in the key; None if there are none."""
        ...

    @property
    def sources(self) -> Images:
        """The clean samples that were mixed, uint8 (s, C, H, W)."""
        ...

    @property
    def source_labels(self) -> Labels:
        """Their labels, int64 (s,)."""
        ...


def report(
    predict_logits: PredictLogits,
    test: ImageSet,
    *,
    samples: Samples | None = None,
    pairs: PairSamples | None = None,
    victim: Labels | None = None,
    nulls: Sequence[Mapping[str, float]] = (),
    statistic: StatisticName = "wsr",
    threshold: float = 0.3,
    knn_accuracy: float | None = None,
    recognise: Recognise | None = None,
    chance: float | None = None,
    signal: Signal | None = None,
    chosen: FilteredSamples | None = None,
) -> ModelReport:
    """Measure a model on held-out data.

    Args:
        predict_logits: The model.
        test: Data on which accuracy and fidelity are measured.
        samples: Held-out watermark samples; None without a key, and nothing of the watermark is reported.
        pairs: The source images of ``samples``, and mixes to compare them with; None for schemes that mix no images.
        victim: The victim's predictions on ``test``, int64 (N,); None leaves out the fidelity.
        nulls: The statistics of every null model; empty for null models themselves.
        statistic: The statistic whose rank gives the p-value; ``wsr`` where it does not exist.
        threshold: The paper's threshold on WSR.
        knn_accuracy: k-NN accuracy of an encoder, copied to the report.
        recognise: A scheme's own test for a success; None counts images classified as the target.
        chance: A scheme's own success rate of innocent models, in [0, 1], for ``p_value_chance``.
        signal: What a scheme's mark is in the answers to clean images; None for schemes with samples of their own.
        chosen: Samples for WSR and ``log_probability`` instead of ``samples``. Everything else, including the key's
            rank and the comparisons, uses ``samples``, since other keys have no chosen samples.

    Returns:
        The report. The cost of the mark (``source_accuracy``, ``source_target_probability``, ``calibration_error``) is
        measured on the clean held-out samples of the source classes, where a customer could notice it. A scheme without
        source classes has only the calibration error, on ``test``.

    Raises:
        DataError: There are no test images or no watermark samples, or the model gives no logits: another shape,
            numbers that are not finite, or probabilities.
    """
    logits = predict_logits(test.images)
    _check_logits(logits, test)
    predicted = logits.argmax(1).astype(np.int64)
    accuracy = metrics.accuracy(predicted, test.labels)
    fidelity = metrics.fidelity(predicted, victim) if victim is not None else None
    if samples is None:
        return ModelReport(accuracy=accuracy, fidelity=fidelity, knn_accuracy=knn_accuracy)
    if not len(samples.images):
        raise DataError("there are no watermark samples to verify with; raise splits.verification_fraction")

    def successes(images: Images) -> tuple[int, int]:
        recognised = predict_logits(images).argmax(1) == samples.target if recognise is None else recognise(images)
        return int(recognised.sum()), len(images)

    sources = predict_logits(samples.sources) if len(samples.sources) else None
    if recognise is None:
        mark = _read_mark(predict_logits, samples, pairs, sources)
    else:
        mark = _recognised_mark(*successes(samples.images))
    if signal is not None:
        mark = _with_signal(mark, predict_logits, signal)
    unfiltered = None
    if chosen is not None:
        unfiltered = proportion(mark.successes, mark.trials)
        mark = _chosen_mark(mark, predict_logits, chosen, samples.target, recognise)
    wfpr = {name: proportion(*successes(images)) for name, images in samples.adverse.items() if len(images)}
    others = samples.other_classes
    null_ranks = ranks_among(mark.statistics, nulls)
    ranked = null_ranks.get(statistic, null_ranks.get("wsr"))
    wsr = proportion(mark.successes, mark.trials)
    if mark.interval is not None:
        wsr = wsr.model_copy(update={"low": mark.interval[0], "high": mark.interval[1]})
    return ModelReport(
        accuracy=accuracy,
        knn_accuracy=knn_accuracy,
        fidelity=fidelity,
        wsr=wsr,
        wsr_unfiltered=unfiltered,
        wfpr=wfpr,
        wfpr_mean=float(np.mean([rate.rate for rate in wfpr.values()])) if wfpr else None,
        wfpr_classes=proportion(*successes(others)) if others is not None and len(others) else None,
        statistics=dict(mark.statistics),
        null_ranks={name: _record(rank) for name, rank in null_ranks.items()},
        key_ranks={name: _record(rank) for name, rank in mark.key_ranks.items()},
        specificity=dict(mark.specificity),
        p_value=ranked.p_value if ranked is not None else None,
        p_value_chance=binomial_p_value(mark.successes, mark.trials, chance) if chance is not None else None,
        infringes_threshold=wsr.rate > threshold,
        **(_mark_cost(logits, test) if sources is None else _source_cost(sources, samples, test.class_names)),
    )


@dataclass(frozen=True)
class _Mark:
    """The mark as measured in a model; see ``ModelReport``."""

    successes: int
    trials: int
    statistics: Mapping[str, float]
    interval: tuple[float, float] | None = None
    key_ranks: Mapping[str, Rank] = field(default_factory=dict)
    specificity: Mapping[str, float] = field(default_factory=dict)


def _recognised_mark(successes: int, trials: int) -> _Mark:
    return _Mark(successes, trials, {"wsr": successes / trials})


def _chosen_mark(
    mark: _Mark, predict_logits: PredictLogits, chosen: FilteredSamples, target: int, recognise: Recognise | None
) -> _Mark:
    """Return the mark with successes, interval, ``wsr`` and ``log_probability`` of the chosen samples."""
    if recognise is not None:
        hits, values = recognise(chosen.images), {}
    else:
        logits = predict_logits(chosen.images)
        hits = logits.argmax(1) == target
        values = {"log_probability": float(log_probabilities(logits)[:, target].mean())}
    interval = None
    if chosen.positions is not None:
        clustered = clustered_interval(hits.astype(np.float64), list(chosen.positions.T), seed=0)
        interval = (clustered.low, clustered.high)
    return replace(
        mark,
        successes=int(hits.sum()),
        trials=len(hits),
        statistics={**mark.statistics, "wsr": float(hits.mean()), **values},
        interval=interval,
    )


def _with_signal(mark: _Mark, predict_logits: PredictLogits, signal: Signal) -> _Mark:
    own, *others = signal.scores(predict_logits(signal.images)).tolist()
    return replace(
        mark,
        statistics={**mark.statistics, "correlation": own},
        key_ranks={**mark.key_ranks, "correlation": rank_among(own, others, "keys")},
    )


def _read_mark(
    predict_logits: PredictLogits, samples: Samples, pairs: PairSamples | None, sources: Logits | None
) -> _Mark:
    own = predict_logits(samples.images)
    hits = int((own.argmax(1) == samples.target).sum())
    statistics = {
        "wsr": hits / len(own),
        "log_probability": float(log_probabilities(own)[:, samples.target].mean()),
    }
    if sources is not None:
        statistics["lean"] = lean(log_probabilities(sources)[:, samples.target], samples.source_labels)
        statistics["lean_labels"] = lean(label_scores(sources.argmax(1), samples.target), samples.source_labels)
    if pairs is None:
        return _Mark(hits, len(own), statistics)
    measured = measure_pairs(predict_logits, own, samples.target, pairs, seed=0)
    interval = (measured.wsr.low, measured.wsr.high)
    statistics |= measured.statistics
    return _Mark(hits, len(own), statistics, interval, measured.key_ranks, measured.specificity)


def ranks_among(measured: Mapping[str, float], nulls: Sequence[Mapping[str, float]]) -> dict[str, Rank]:
    """Rank each statistic among the null models that have it; empty without null models."""
    ranks = {}
    for name, value in measured.items():
        references = [null[name] for null in nulls if name in null]
        if references:
            ranks[name] = rank_among(value, references)
    return ranks


def _record(rank: Rank) -> RankRecord:
    return RankRecord(at_least=rank.at_least, references=rank.references)


def _check_logits(logits: npt.NDArray[np.float32], test: ImageSet) -> None:
    """Reject what cannot be logits: a second softmax over probabilities would go unnoticed."""
    expected = (len(test), test.classes)
    if logits.shape != expected:
        raise DataError(f"the model gives {logits.shape} logits for {len(test)} images of {test.classes} classes")
    if not np.isfinite(logits).all():
        raise DataError("the model gives logits that are not finite numbers")
    if (logits >= 0).all() and np.allclose(logits.sum(1), 1, atol=1e-3):
        raise DataError(
            "the model gives probabilities (every row sums to 1), but logits are expected; leave out its softmax, or "
            "give the logarithms of the probabilities"
        )


def _mark_cost(logits: Logits, test: ImageSet) -> dict[str, Any]:
    """Return what a mark without source classes costs on clean images, as fields of the report."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    return {"calibration_error": metrics.calibration_error(probabilities, test.labels)}


def _source_cost(logits: Logits, samples: Samples, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Return what the mark costs on clean images of the source classes, as fields of the report."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    right = probabilities.argmax(1) == samples.source_labels
    return {
        "source_accuracy": {
            class_names[label]: float(right[samples.source_labels == label].mean())
            for label in map(int, np.unique(samples.source_labels))
        },
        "source_target_probability": float(probabilities[:, samples.target].mean()),
        "calibration_error": metrics.calibration_error(probabilities, samples.source_labels),
    }
