"""Which statistic separates stolen from innocent models best: a table over all trials, for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mea_ray.calibration.separation import Separation, separations
from mea_ray.report.tables import percent
from mea_ray.results.records import TrialResult

LEAST_INNOCENT = 2
HEADINGS = {
    "queries": "Queries",
    "statistic": "Statistic",
    "innocent": "Innocent models",
    "stolen": "Stolen models",
    "tpr_at_0": "Recognised at no false accusation",
    "tpr_at_1": "at 1%",
    "auc": "AUC",
}
"""Heading of each column of ``StatisticRow``, in display order."""


@dataclass(frozen=True)
class StatisticRow:
    """One statistic at one budget, as display texts."""

    queries: str
    statistic: str
    innocent: str
    stolen: str
    tpr_at_0: str
    tpr_at_1: str
    auc: str


def lines(results: Sequence[TrialResult]) -> list[StatisticRow]:
    """Return one row for each budget and statistic, the best statistic of a budget first.

    Innocent models are the distinct null models, and those that were stolen with the budget. There are no rows for a
    budget with fewer than two of them.
    """
    nulls = {
        (result.victim, name): report.statistics
        for result in results
        for name, report in zip(result.nulls, result.null_reports, strict=False)
        if report.statistics
    }
    table = []
    for budget in sorted({rung.budget for result in results for rung in result.rungs}):
        stolen_nulls = [
            rung.report.statistics
            for result in results
            for rung in result.stolen_nulls
            if rung.budget == budget and rung.report.statistics
        ]
        stolen = [
            rung.report.statistics
            for result in results
            for rung in result.rungs
            if rung.budget == budget and rung.report.statistics
        ]
        innocent = [*nulls.values(), *stolen_nulls]
        if len(innocent) >= LEAST_INNOCENT and stolen:
            table += [_row(f"{budget:,}", each) for each in separations(innocent, stolen)]
    return table


def _row(queries: str, separation: Separation) -> StatisticRow:
    return StatisticRow(
        queries=queries,
        statistic=separation.statistic,
        innocent=f"{separation.innocent:,}",
        stolen=f"{separation.stolen:,}",
        tpr_at_0=percent(separation.tpr_at_0, 0),
        tpr_at_1=percent(separation.tpr_at_1, 0),
        auc=f"{separation.auc:.3f}",
    )
