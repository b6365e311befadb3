"""A sweep of many points: each point at its largest budget, averaged over its seeds.

The page of thousands of trials is computed from these: marginals, the best and the worst points, the front of proof
against cost, and the importance of each setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mea_ray.report.tables import DASH, Judgements, Tone, grouped, mean, percent, tone_of
from mea_ray.report.verdict import last_rung
from mea_ray.results.numbers import victim_gap
from mea_ray.results.points import is_seed, setting, short_name, short_paths
from mea_ray.results.records import TrialResult
from mea_ray.verification.verdict import SEVERITY, Verdict

BINS = 6
"""Number of ranges for a numeric setting with more distinct values than this, with equally many points in each."""
EDGE = 5
"""Number of listed best and worst points."""


@dataclass(frozen=True)
class PointResult:
    """One point of a sweep at its largest budget; means over seeds.

    Attributes:
        name: Short text of its settings.
        values: Its settings by config path, without seeds.
        trials: Names of its trials.
        wsr: WSR of the substitutes, in [0, 1]; None without a watermark.
        margin: WSR of the substitutes minus the largest WSR of an innocent model, in [-1, 1].
        least: WSR after the most effective removal, in [0, 1]; ``wsr`` if none was tried.
        accuracy: Accuracy of the substitutes, in [0, 1].
        fidelity: Their agreement with the victim, in [0, 1].
        gap: Accuracy that customers lose because of the watermark, a fraction; None without null models.
        verdict: The worst verdict over the seeds; None if nothing is judged.
        proved: Fraction of the seeds for which theft is proved.
    """

    name: str
    values: Mapping[str, Any]
    trials: tuple[str, ...]
    wsr: float | None
    margin: float | None
    least: float | None
    accuracy: float | None
    fidelity: float | None
    gap: float | None
    verdict: Verdict | None
    proved: float | None

    @property
    def tone(self) -> Tone:
        """Colour of the verdict."""
        return "mixed" if self.verdict is None else tone_of(self.verdict)


def point_results(results: Sequence[TrialResult], judged: Judgements) -> list[PointResult]:
    """Return the points of a sweep with at least one rung.

    Args:
        results: The trials.
        judged: Judgements on all their substitutes.
    """
    short = short_paths(list(dict.fromkeys(path for result in results for path in result.point)))
    results_by_point = []
    for trials in grouped(results).values():
        if any(last_rung(trial) is not None for trial in trials):
            results_by_point.append(_point(trials, judged, short))
    return results_by_point


def _point(trials: Sequence[TrialResult], judged: Judgements, short: Mapping[str, str]) -> PointResult:
    ends = [(trial, rung) for trial in trials if (rung := last_rung(trial)) is not None]
    rates = [rung.report.wsr.rate for _, rung in ends if rung.report.wsr is not None]
    innocent = [report.wsr.rate for trial in trials for report in trial.null_reports if report.wsr is not None]
    innocent += [
        rung.report.wsr.rate
        for trial, end in ends
        for rung in trial.stolen_nulls
        if rung.budget == end.budget and rung.report.wsr is not None
    ]
    verdicts = [
        judged[trial.trial, rung.budget].verdict for trial, rung in ends if (trial.trial, rung.budget) in judged
    ]
    wsr = mean(rates)
    return PointResult(
        name=short_name(trials[0].point, short),
        values={path: value for path, value in trials[0].point.items() if not is_seed(path)},
        trials=tuple(trial.trial for trial in trials),
        wsr=wsr,
        margin=wsr - max(innocent) if wsr is not None and innocent else None,
        least=mean([_left(trial, rung.report.wsr.rate if rung.report.wsr else None) for trial, rung in ends]),
        accuracy=mean([rung.report.accuracy for _, rung in ends]),
        fidelity=mean([rung.report.fidelity for _, rung in ends]),
        gap=mean([victim_gap(trial) for trial, _ in ends]),
        verdict=min(verdicts, key=SEVERITY.index, default=None),
        proved=verdicts.count("proved") / len(verdicts) if verdicts else None,
    )


def _left(trial: TrialResult, wsr: float | None) -> float | None:
    after = [
        removal.after.wsr.rate
        for removal in trial.removals
        if removal.tried_on == "substitute" and removal.after.wsr is not None
    ]
    return min(after, default=wsr)


def front(points: Sequence[PointResult]) -> list[PointResult]:
    """Return the Pareto front: points that no other point dominates in margin and cost to customers, cheapest first."""
    known = [point for point in points if point.margin is not None and point.gap is not None]
    known.sort(key=lambda point: (point.gap or 0.0, -(point.margin or 0.0)))
    best: list[PointResult] = []
    for point in known:
        if not best or (point.margin or 0.0) > (best[-1].margin or 0.0):
            best.append(point)
    return best


def ranked(points: Sequence[PointResult]) -> list[PointResult]:
    """Return the points by verdict, then by WSR after removals, then by margin, best first."""
    lowest = float("-inf")

    def key(point: PointResult) -> tuple[int, float, float]:
        severity = -1 if point.verdict is None else SEVERITY.index(point.verdict)
        return (
            severity,
            lowest if point.least is None else point.least,
            lowest if point.margin is None else point.margin,
        )

    return sorted(points, key=key, reverse=True)


@dataclass(frozen=True)
class Marginal:
    """The points that share one value of a setting, or a range of its values.

    Attributes:
        value: The value or the range, as text.
        points: How many there are.
        wsr: Mean WSR, in [0, 1].
        least: Mean WSR after the most effective removal.
        accuracy: Mean accuracy of the substitutes.
        gap: Mean accuracy that customers lose.
        proved: Fraction for which theft is proved.
    """

    value: str
    points: int
    wsr: float | None
    least: float | None
    accuracy: float | None
    gap: float | None
    proved: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts of a table row."""
        gap = DASH if self.gap is None else f"{100 * self.gap:.1f}"
        rates = (percent(self.wsr), percent(self.least), percent(self.accuracy))
        return (self.value, f"{self.points:,}", *rates, gap, percent(self.proved, 0))


MARGINAL_HEADINGS = ("Value", "Points", "WSR", "After removal", "Substitute accuracy", "Customers lose", "Proved")


def paths_of(points: Sequence[PointResult]) -> list[str]:
    """Return the config paths that have more than one value, in the order of first appearance."""
    values: dict[str, set[str]] = {}
    for point in points:
        for path, value in point.values.items():
            values.setdefault(path, set()).add(setting(value))
    return [path for path, seen in values.items() if len(seen) > 1]


def levels(points: Sequence[PointResult], path: str) -> pd.Series[str]:
    """Return the level of one setting at each point: its value, or one of ``BINS`` ranges of many numbers.

    Returns:
        The value or range as text, by the point's index in ``points``, in the order of the levels, numbers ascending.
        Points without the setting are omitted.
    """
    values = pd.Series(
        {place: each.values[path] for place, each in enumerate(points) if path in each.values}, dtype="O"
    )
    texts = values.map(setting)
    if not values.map(is_number).all():
        return texts
    numbers = values.astype(float).sort_values(kind="stable")
    if texts.nunique() <= BINS:
        return texts[numbers.index]
    parts = pd.Series(np.arange(len(numbers)) * BINS // len(numbers), index=numbers.index)
    by_part = numbers.groupby(parts)
    ends = zip(by_part.transform("first"), by_part.transform("last"), strict=True)
    return pd.Series([f"{first:.3g} to {last:.3g}" for first, last in ends], index=numbers.index)


def is_number(value: Any) -> bool:
    """Return whether a value is a number and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def marginals(points: Sequence[PointResult], path: str) -> list[Marginal]:
    """Return one row for each level of a setting; the most frequent ``2 * BINS`` of a text setting with many values."""
    level = levels(points, path)
    by_level = _numbers(points).loc[level.index].groupby(level, sort=False)
    means, sizes = by_level.mean(), by_level.size()
    drawn = [
        Marginal(str(value), int(sizes[value]), *(None if np.isnan(each) else float(each) for each in means.loc[value]))
        for value in means.index
    ]
    if len(drawn) <= 2 * BINS:
        return drawn
    return sorted(drawn, key=lambda line: line.points, reverse=True)[: 2 * BINS]


def _numbers(points: Sequence[PointResult]) -> pd.DataFrame:
    """Return the numbers of the points, one row each, in the order of ``Marginal``; NaN if unknown."""
    names = ["wsr", "least", "accuracy", "gap", "proved"]
    return pd.DataFrame([[getattr(each, name) for name in names] for each in points], columns=names, dtype=float)


OBJECTIVES: Mapping[str, str] = {
    "WSR": "wsr",
    "WSR after removal": "least",
    "substitute accuracy": "accuracy",
    "customers lose": "gap",
}
"""Objectives for which importances are computed: heading, and attribute of ``PointResult``."""


def importance(points: Sequence[PointResult], path: str, objective: str) -> float:
    """Return the fraction of an objective's variance that one setting explains alone (epsilon squared, Kelley 1935).

    It is corrected for the number of levels, so that a setting without effect has 0 on average. Interactions of
    settings are not included.

    Args:
        points: The points.
        path: The setting's config path.
        objective: An attribute of ``PointResult``, a number.

    Returns:
        A fraction in [0, 1]; NaN where the objective does not vary or there are too few points.
    """
    return _importance(_numbers(points)[objective], levels(points, path))


def _importance(objective: pd.Series[float], level: pd.Series[str]) -> float:
    values = objective[level.index].dropna()
    groups = values.groupby(level[values.index])
    free = len(values) - groups.ngroups
    total = float(((values - values.mean()) ** 2).sum())
    if free < 1 or groups.ngroups < 2 or total < 1e-15:
        return float("nan")
    within = float(((values - groups.transform("mean")) ** 2).sum())
    return min(1.0, max(0.0, 1 - (within / free) / (total / (len(values) - 1))))


def importances(points: Sequence[PointResult]) -> list[tuple[str, dict[str, float]]]:
    """Return for each setting its importance for each of ``OBJECTIVES``, the most important for WSR first."""
    numbers = _numbers(points)
    by_path = []
    for path in paths_of(points):
        level = levels(points, path)
        by_path.append((path, {name: _importance(numbers[each], level) for name, each in OBJECTIVES.items()}))
    return sorted(by_path, key=lambda line: -max((v for v in line[1].values() if v == v), default=0.0))
