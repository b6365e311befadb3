"""A sweep of many points, one number each: the largest budget of a point, its seeds averaged.

What a page about thousands of trials shows is computed from these: marginals, the best and the worst points, the front
of proof against cost, and how much each setting matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mea_ray.report.tables import DASH, Judgements, Tone, grouped, mean, percent, tone_of
from mea_ray.report.verdict import last_rung
from mea_ray.results.numbers import victim_gap
from mea_ray.results.points import is_seed, setting, short_name, short_paths
from mea_ray.results.records import TrialResult
from mea_ray.verification.verdict import SEVERITY, Verdict

BINS = 6
"""Ranges that the values of a number with more than so many values are divided into, with as many points in each."""
EDGE = 5
"""Best and worst points that are listed."""


@dataclass(frozen=True)
class PointResult:
    """One point of a sweep at its largest budget; means over seeds.

    Attributes:
        name: Its settings in short.
        values: Its settings by config path, without seeds.
        trials: Names of its trials.
        wsr: WSR of the substitutes, in [0, 1]; None without a watermark.
        margin: WSR of the substitutes less the largest WSR of an innocent model, in [-1, 1]: the power of the proof.
        least: WSR that the most effective removal left, in [0, 1]; ``wsr`` where none was tried.
        accuracy: Accuracy of the substitutes, in [0, 1].
        fidelity: Their agreement with the victim, in [0, 1].
        gap: Accuracy that customers lose by the watermark, a fraction; None without null models.
        verdict: The worst verdict of the seeds; None where nothing is judged.
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
    """Return the points of a sweep that reached a rung.

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
    """Return the Pareto front: points that no other beats in both margin and cost to customers, cheapest first."""
    known = [point for point in points if point.margin is not None and point.gap is not None]
    known.sort(key=lambda point: (point.gap or 0.0, -(point.margin or 0.0)))
    best: list[PointResult] = []
    for point in known:
        if not best or (point.margin or 0.0) > (best[-1].margin or 0.0):
            best.append(point)
    return best


def ranked(points: Sequence[PointResult]) -> list[PointResult]:
    """Return the points by verdict, then by what removals left, then by margin, best first."""
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
        """The texts of a table's line."""
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


def levels(points: Sequence[PointResult], path: str) -> dict[str, list[PointResult]]:
    """Divide the points by one setting: by its values, or a number of many values into ``BINS`` ranges.

    Returns:
        The points by value or range as text, numbers rising; points without the setting are left out.
    """
    having = [point for point in points if path in point.values]
    by_value: dict[str, list[PointResult]] = {}
    for point in having:
        by_value.setdefault(setting(point.values[path]), []).append(point)
    if not all(is_number(point.values[path]) for point in having):
        return by_value
    having.sort(key=lambda point: float(point.values[path]))
    if len(by_value) <= BINS:
        return {setting(point.values[path]): by_value[setting(point.values[path])] for point in having}
    parts = [[having[place] for place in part] for part in np.array_split(np.arange(len(having)), BINS) if len(part)]
    return {f"{part[0].values[path]:.3g} to {part[-1].values[path]:.3g}": part for part in parts}


def is_number(value: Any) -> bool:
    """Return whether a value is a number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def marginals(points: Sequence[PointResult], path: str) -> list[Marginal]:
    """Return one line for each level of a setting; the most frequent ``2 * BINS`` of names with many values."""
    drawn = [
        Marginal(
            value,
            len(part),
            *(mean([getattr(each, name) for each in part]) for name in ("wsr", "least", "accuracy", "gap", "proved")),
        )
        for value, part in levels(points, path).items()
    ]
    if len(drawn) <= 2 * BINS:
        return drawn
    return sorted(drawn, key=lambda line: line.points, reverse=True)[: 2 * BINS]


OBJECTIVES: Mapping[str, Callable[[PointResult], float | None]] = {
    "WSR": lambda point: point.wsr,
    "WSR after removal": lambda point: point.least,
    "substitute accuracy": lambda point: point.accuracy,
    "customers lose": lambda point: point.gap,
}
"""What the importance of a setting is computed for."""


def importance(points: Sequence[PointResult], path: str, objective: Callable[[PointResult], float | None]) -> float:
    """Return the part of an objective's variance that one setting explains alone (epsilon squared, Kelley 1935).

    It is corrected for the number of levels, so that a setting without effect has 0 in the mean. What settings do only
    together is not in it.

    Returns:
        A fraction in [0, 1]; NaN where the objective does not vary or there are too few points.
    """
    groups = [
        [value for point in part if (value := objective(point)) is not None] for part in levels(points, path).values()
    ]
    groups = [part for part in groups if part]
    values = np.array([value for part in groups for value in part])
    free = len(values) - len(groups)
    total = float(((values - values.mean()) ** 2).sum()) if len(values) else 0.0
    if free < 1 or len(groups) < 2 or total < 1e-15:
        return float("nan")
    within = sum(float(((np.array(part) - np.mean(part)) ** 2).sum()) for part in groups)
    return min(1.0, max(0.0, 1 - (within / free) / (total / (len(values) - 1))))


def importances(points: Sequence[PointResult]) -> list[tuple[str, dict[str, float]]]:
    """Return for each setting its importance for each of ``OBJECTIVES``, the most important for WSR first."""
    by_path = [
        (path, {name: importance(points, path, objective) for name, objective in OBJECTIVES.items()})
        for path in paths_of(points)
    ]
    return sorted(by_path, key=lambda line: -max((v for v in line[1].values() if v == v), default=0.0))
