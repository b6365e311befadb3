"""Merges the reports of one model with several keys into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mea_ray.core.errors import DataError
from mea_ray.results.records import ModelReport, RankRecord, SuccessRate
from mea_ray.verification.keys import combined_rank
from mea_ray.verification.ranks import Rank
from mea_ray.verification.verify import ranks_among


def merged(
    reports: Sequence[ModelReport], *, nulls: Sequence[Mapping[str, float]], statistic: str, threshold: float
) -> ModelReport:
    """Merge the reports of one model, one for each of several keys.

    Args:
        reports: One for each key, of the same model, made without null models.
        nulls: The statistics of every null model, merged in the same way; empty for null models themselves.
        statistic: The statistic whose rank gives the p-value; ``wsr`` where it does not exist.
        threshold: The paper's threshold on WSR.

    Returns:
        The report. Successes are summed, and statistics are means over the keys. The ranks of the keys combine by
        their product (see ``combined_rank``). A comparison has the largest of its p-values: the mark is as specific as
        its least specific key. The interval of the WSR is the mean of the keys' intervals, as if they were fully
        correlated.

    Raises:
        DataError: There is no report, or one without a WSR.
    """
    rates = [report.wsr for report in reports]
    if not reports or any(rate is None for rate in rates):
        raise DataError("reports of several keys need at least one, each with a WSR")
    wsr = _summed(rates)
    statistics = {
        name: float(np.mean([report.statistics[name] for report in reports]))
        for name in reports[0].statistics
        if all(name in report.statistics for report in reports)
    }
    null_ranks = ranks_among(statistics, nulls)
    ranked = null_ranks.get(statistic, null_ranks.get("wsr"))
    wfpr = {name: _summed(report.wfpr.get(name) for report in reports) for name in _names(r.wfpr for r in reports)}
    others = [report.wfpr_classes for report in reports]
    unfiltered = [report.wsr_unfiltered for report in reports]
    changes: dict[str, Any] = {
        "wsr": wsr,
        "wsr_unfiltered": _summed(unfiltered) if all(unfiltered) else None,
        "wfpr": wfpr,
        "wfpr_mean": float(np.mean([rate.rate for rate in wfpr.values()])) if wfpr else None,
        "wfpr_classes": _summed(others) if any(others) else None,
        "statistics": statistics,
        "null_ranks": {n: RankRecord(at_least=r.at_least, references=r.references) for n, r in null_ranks.items()},
        "key_ranks": {name: _combined(reports, name) for name in _in_all(report.key_ranks for report in reports)},
        "specificity": {
            name: max(report.specificity.get(name, 0.0) for report in reports)
            for name in _names(report.specificity for report in reports)
        },
        "p_value": None if ranked is None else ranked.p_value,
        "infringes_threshold": wsr.rate > threshold,
        "source_accuracy": {name: value for report in reports for name, value in report.source_accuracy.items()},
        "source_target_probability": _mean(report.source_target_probability for report in reports),
        "calibration_error": _mean(report.calibration_error for report in reports),
    }
    return reports[0].model_copy(update=changes)


def _combined(reports: Sequence[ModelReport], name: str) -> RankRecord:
    ranks = [Rank(r.key_ranks[name].at_least, r.key_ranks[name].references, "keys") for r in reports]
    rank = combined_rank(ranks)
    return RankRecord(at_least=rank.at_least, references=rank.references)


def _names(trees: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for tree in trees for name in tree))


def _in_all(trees: Iterable[Mapping[str, Any]]) -> list[str]:
    known = list(trees)
    return [name for name in known[0] if all(name in tree for tree in known)]


def _summed(rates: Iterable[SuccessRate | None]) -> SuccessRate:
    known = [rate for rate in rates if rate is not None]
    successes, trials = sum(rate.successes for rate in known), sum(rate.trials for rate in known)
    return SuccessRate(
        successes=successes,
        trials=trials,
        rate=successes / trials if trials else 0.0,
        low=float(np.mean([rate.low for rate in known])),
        high=float(np.mean([rate.high for rate in known])),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
