"""The table of statistics over trials."""

from __future__ import annotations

import pytest
from report_results import trial, with_innocents

from mea_ray.report import statistics
from mea_ray.report.markdown import statistics_table
from mea_ray.report.terminal import make_console, print_results
from mea_ray.results.records import ModelReport, TrialResult


def with_statistics(result: TrialResult, value: float) -> TrialResult:
    """The trial, where ``lean`` tells all stolen models from all innocent ones and ``wsr`` tells some."""

    def measured(report: ModelReport, lean: float, wsr: float) -> ModelReport:
        return report.model_copy(update={"statistics": {"lean": lean, "wsr": wsr}})

    innocent = with_innocents(result, 3).model_copy(update={"nulls": ["n0", "n1", "n2"]})
    return innocent.model_copy(
        update={
            "null_reports": [measured(r, -9.0, 0.3) for r in innocent.null_reports],
            "stolen_nulls": [
                r.model_copy(update={"report": measured(r.report, -8.0, 0.1)}) for r in innocent.stolen_nulls
            ],
            "rungs": [r.model_copy(update={"report": measured(r.report, -1.0, value)}) for r in innocent.rungs],
        }
    )


def test_shared_null_models_count_once_and_the_best_statistic_comes_first() -> None:
    trials = [with_statistics(trial("a"), 0.2), with_statistics(trial("b", seed=1), 0.9)]
    rows = statistics.lines(trials)
    assert [row.queries for row in rows] == ["100", "100", "300", "300", "1,000", "1,000"]
    first, second = rows[:2]
    assert (first.statistic, first.innocent, first.stolen, first.tpr_at_0, first.auc) == (
        "lean",
        "9",
        "2",
        "100%",
        "1.000",
    )
    assert (second.statistic, second.tpr_at_0) == ("wsr", "50%")


def test_results_without_statistics_have_no_table() -> None:
    assert statistics.lines([trial("a")]) == []
    assert statistics_table("s", [trial("a")]) == "Too few innocent models were measured."


def test_the_terminal_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(make_console(), [with_statistics(trial("a"), 0.9)])
    assert "Recognised at no false accusation" in capsys.readouterr().out
