"""Points of a sweep over their seeds: mean and 95 % interval, for the terminal and the HTML report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mea_ray.report import curves, tables
from mea_ray.results.records import TrialResult
from mea_ray.verification.evidence import judge_rungs
from mea_ray.verification.verdict import SEVERITY, Judgement

HEADINGS = {
    "point": "Setting",
    "queries": "Queries",
    "seeds": "Seeds",
    "wsr": "WSR",
    "wfpr": "WFPR",
    "accuracy": "Substitute accuracy",
    "fidelity": "Fidelity",
    "verdicts": "Verdicts",
}
"""Heading of each column of ``SeedsRow``, in display order."""
CAPTION = (
    "Means over seeds with their 95% Student interval, cut to 0 to 100%; of two seeds, from the one to the other. "
    "It is about other seeds of what was varied, and about nothing that all trials share."
)


@dataclass(frozen=True)
class SeedsRow:
    """One row: the trials of one point at one budget, as display texts."""

    point: str
    queries: str
    seeds: str
    wsr: str
    wfpr: str
    accuracy: str
    fidelity: str
    verdicts: str


def lines(results: Sequence[TrialResult], judged: tables.Judgements | None = None) -> list[SeedsRow]:
    """Return one row per point and budget, for points with two seeds or more; ``judged`` as in ``tables.rows``."""
    table = []
    judged = judge_rungs(results) if judged is None else judged
    for name, trials in tables.grouped(results).items():
        if len(trials) < 2:
            continue
        columns = {
            metric: {point.budget: point for point in curves.series(trials, metric)} for metric in curves.METRICS
        }
        for budget, at in columns["accuracy"].items():
            reports = [rung.report for trial in trials for rung in trial.rungs if rung.budget == budget]
            verdicts = [judged[trial.trial, budget] for trial in trials if (trial.trial, budget) in judged]
            texts = {metric: _interval(points.get(budget)) for metric, points in columns.items()}
            table.append(
                SeedsRow(
                    point=name,
                    queries=f"{at.queries:,.0f}",
                    seeds=str(len(reports)),
                    verdicts=counted(verdicts),
                    **texts,
                )
            )
    return table


def counted(judgements: Sequence[Judgement]) -> str:
    """Return how many trials have each verdict, worst first; only the verdict if all have the same."""
    counts = Counter(judgement.verdict for judgement in judgements)
    named = [(verdict, counts[verdict]) for verdict in SEVERITY if verdict in counts]
    if len(named) == 1:
        return named[0][0]
    return ", ".join(f"{count} {verdict}" for verdict, count in named) or tables.DASH


def _interval(point: curves.Point | None) -> str:
    """Return mean and interval, with the number of seeds if some seeds lack the number."""
    if point is None:
        return tables.DASH
    if len(point.values) < 2:
        return f"{tables.percent(point.mean)} (1 seed)"
    return f"{tables.percent(point.mean)} [{100 * point.low:.1f}, {100 * point.high:.1f}]"
