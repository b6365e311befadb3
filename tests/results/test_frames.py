from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from report_results import trial, with_removals, write_sweep

import mea_ray
from mea_ray.results.frames import COLUMNS, frame


def test_there_is_one_row_for_each_measured_model(tmp_path: Path) -> None:
    results = write_sweep(tmp_path)
    data = mea_ray.load_results(tmp_path)
    assert data["model"].value_counts().to_dict() == {"substitute": 18, "victim": 6, "null model": 6}
    assert tuple(data.columns) == (*COLUMNS, "thief.model.name", "seed")
    assert set(data["trial"]) == {result.trial for result in results}


def test_the_numbers_are_those_of_the_results() -> None:
    result = trial("t1", "alexnet", seed=3)
    data = frame([result])
    row = data[(data.model == "substitute") & (data.budget == 300)].iloc[0]
    report = result.rungs[1].report
    assert report.wsr is not None
    assert (row.wsr, row.wsr_low, row.wsr_high) == (report.wsr.rate, report.wsr.low, report.wsr.high)
    assert (row.accuracy, row.fidelity, row.wfpr) == (report.accuracy, report.fidelity, report.wfpr_mean)
    assert (
        bool(row.above_threshold) is report.infringes_threshold
        and row["thief.model.name"] == "alexnet"
        and row.seed == 3
    )
    victim = data[data.model == "victim"].iloc[0]
    assert pd.isna(victim.budget) and victim.accuracy == result.victim_report.accuracy


def test_a_curve_is_one_group_by(tmp_path: Path) -> None:
    results = write_sweep(tmp_path)
    data = mea_ray.load_results(str(tmp_path))
    curve = data[data.model == "substitute"].groupby(["thief.model.name", "queries"]).wsr.mean()
    rates = [r.rungs[2].report.wsr for r in results if r.point["thief.model.name"] == "resnet18"]
    assert curve["resnet18", 1000] == pytest.approx(sum(rate.rate for rate in rates if rate) / 3)


def test_removals_and_settings_with_parameters_are_texts() -> None:
    result = with_removals(trial("t1"))
    point = {"thief.attack": {"name": "knockoff", "policy": "random"}, "thief.budgets": [1, 2], "seed": None}
    data = frame([result.model_copy(update={"point": point})])
    removed = data[data.model == "after removal"]
    assert list(removed.removal) == ["pruning(rate=0.9)", "pruning(rate=0.1)", "<tune>", "pruning(rate=0.9)"]
    assert list(removed.tried_on) == ["substitute"] * 3 + ["null_model"]
    assert data["thief.attack"].iloc[0] == "knockoff(policy=random)" and data["thief.budgets"].iloc[0] == "1, 2"
