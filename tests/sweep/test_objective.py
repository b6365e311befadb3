"""What a search looks for: constraints reach Optuna, several objectives give a front."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from report_results import trial

from mea_ray.config import SearchConfig, SweepConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.report import search as search_report
from mea_ray.results.numbers import METRICS, trial_metrics
from mea_ray.sweep.objective import best, judged, violation
from mea_ray.sweep.search import check_metric, optuna_search

NAN = float("nan")


def search(**settings: Any) -> SearchConfig:
    return build(SearchConfig, {"name": "optuna", **settings})


def sweep(**settings: Any) -> SweepConfig:
    space = {"victim.watermark.com.weight": {"uniform": [0.0, 1.0]}}
    return build(SweepConfig, {"space": space, "search": {"name": "optuna", "samples": 9, **settings}})


def numbers(**known: float) -> dict[str, float]:
    return {**dict.fromkeys(METRICS, NAN), **known}


def play(searcher: Any, trials: int) -> list[float]:
    """A watermark that travels the further, and costs the more, the larger its weight x: WSR x, gap x / 10."""
    tried = []
    for place in range(trials):
        x = searcher.suggest(f"t{place}")["p0"]
        messages = {**numbers(wsr=x, victim_gap=x / 10), "training_iteration": 1}
        searcher.on_trial_result(f"t{place}", messages)
        searcher.on_trial_complete(f"t{place}", messages)
        tried.append(x)
    return tried


def test_optuna_goes_where_wsr_is_highest_and_with_a_constraint_stays_within_it() -> None:
    free = play(optuna_search(sweep(), [], []), 40)
    bound = play(optuna_search(sweep(constraints={"victim_gap": 0.05}), [], []), 40)
    late = bound[20:]  # x above 0.5 is out of bounds
    assert fmean(free[20:]) > 0.85 and fmean(late) < 0.6
    assert sum(x <= 0.5 for x in late) >= len(late) / 2 and max(x for x in late if x <= 0.5) > 0.45


def test_the_constraint_is_reported_and_the_value_is_not_penalised() -> None:
    searcher = optuna_search(sweep(constraints={"victim_gap": 0.05}), [], [])
    (x,) = play(searcher, 1)
    (messages,) = searcher.study.trials
    assert messages.value == x and messages.constraints == {"victim_gap": pytest.approx(x / 10 - 0.05)}


def test_several_objectives_are_several_values_and_what_failed_teaches_nothing() -> None:
    searcher = optuna_search(sweep(metric=["wsr", "victim_gap"], mode=["max", "min"]), [], [])
    xs = play(searcher, 3)
    searcher.suggest("bad")
    searcher.on_trial_complete("bad", numbers())
    searcher.suggest("dead")
    searcher.on_trial_complete("dead", error=True)
    *good, bad, dead = searcher.study.trials
    assert [each.values for each in good] == [[x, x / 10] for x in xs]
    assert [each.state.name for each in (bad, dead)] == ["FAIL", "FAIL"]


def test_finished_trials_are_reported_with_their_constraints() -> None:
    done = trial("t").model_copy(update={"point": {"victim.watermark.com.weight": 0.25}})
    (messages,) = optuna_search(sweep(constraints={"victim_gap": 0.001}), [done], []).study.trials
    wsr = done.rungs[-1].report.wsr
    assert wsr is not None and messages.params == {"p0": 0.25} and messages.value == wsr.rate
    assert messages.constraints == {"victim_gap": pytest.approx(0.956 - 0.952 - 0.001)}
    markless = done.rungs[-1].model_copy(update={"report": done.rungs[-1].report.model_copy(update={"wsr": None})})
    (failed,) = optuna_search(sweep(), [done.model_copy(update={"rungs": [markless]})], []).study.trials
    assert failed.state.name == "FAIL"


def test_the_gap_is_what_the_victim_lacks_against_the_mean_of_its_null_models() -> None:
    done = trial("t")
    nulls = [done.null_reports[0].model_copy(update={"accuracy": value}) for value in (0.96, 0.98)]
    two, none = (done.model_copy(update={"null_reports": reports}) for reports in (nulls, []))
    assert trial_metrics(two, done.rungs[0])["victim_gap"] == pytest.approx(0.97 - 0.952)
    assert math.isnan(trial_metrics(none, done.rungs[0])["victim_gap"])


@pytest.mark.parametrize("mode", ["max", "min"])
def test_asha_sees_infeasible_trials_last_and_the_worse_the_further_out(mode: str) -> None:
    sought = search(metric="wsr", mode=mode, constraints={"victim_gap": 0.02})
    feasible = [judged(sought, numbers(wsr=x, victim_gap=0.02)) for x in (0.0, 1.0)]
    near, far, unknown = (judged(sought, numbers(wsr=0.5, victim_gap=gap)) for gap in (0.03, 0.2, NAN))
    assert feasible == [0.0, 1.0]
    order = [*feasible, near, far, unknown]
    ranked = sorted(order, reverse=mode == "max")
    assert ranked[2:] == [near, far, unknown]
    assert math.isnan(judged(search(), numbers()))


def test_the_best_are_feasible_and_not_dominated() -> None:
    trials = [
        numbers(wsr=0.9, victim_gap=0.10),
        numbers(wsr=0.8, victim_gap=0.02),
        numbers(wsr=0.7, victim_gap=0.03),  # worse than the one before in both
        numbers(wsr=0.5, victim_gap=-0.01),
        numbers(wsr=NAN, victim_gap=-0.5),
    ]
    front = search(metric=["wsr", "victim_gap"], mode=["max", "min"])
    assert best(front, trials) == [0, 1, 3]
    assert best(search(), trials) == [0]
    assert best(search(constraints={"victim_gap": 0.02}), trials) == [1]
    assert best(search(metric="victim_gap", mode="min"), trials) == [4]
    assert best(search(constraints={"victim_gap": -1.0}), trials) == []
    assert math.isnan(violation(search(constraints={"wsr": 1.0}), trials[-1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": ["wsr", "accuracy"]}, "one mode for each metric"),
        ({"metric": ["wsr"], "mode": ["max", "min"]}, "one mode for each metric"),
        ({"metric": [], "mode": []}, "one mode for each metric"),
        ({"constraints": {"gap": "little"}}, "constraints.gap"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**settings)


def test_an_unknown_constraint_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"search\.constraints='victim_gp'.*victim_gap"):
        check_metric(sweep(constraints={"victim_gp": 0.1}))


def test_the_report_names_the_best_and_counts_what_was_out_of_bounds(tmp_path: Path) -> None:
    bad = trial("bad", seed=3, end=0.9)
    worse = bad.victim_report.model_copy(update={"accuracy": 0.5})
    results = [trial("a", seed=1), trial("b", seed=2), bad.model_copy(update={"victim_report": worse})]
    result = search_report.outcome(search(constraints={"victim_gap": 0.02}), results)
    assert result is not None and result.title.endswith("on test images: report other seeds; 1 out of bounds")
    assert [line[0] for line in result.lines] == ["thief.model=vgg_like, seed=2"]
    assert result.headings == ("Setting", "wsr", "victim_gap") and result.lines[0][2] == "0.4%"
    (tmp_path / "sweep.yaml").write_text("search: {name: grid}\n")
    assert search_report.search_of(tmp_path) is None
    (tmp_path / "sweep.yaml").write_text("search: {name: optuna}\n")
    assert search_report.search_of(tmp_path) == search()
