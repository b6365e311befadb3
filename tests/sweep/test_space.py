from __future__ import annotations

import math
from typing import Any

import pytest
from golden import MadeUp, fingerprints

from mea_ray.config import SweepConfig, build
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.experiment.names import Names
from mea_ray.results.portable import portable_point
from mea_ray.results.records import ModelReport, RungResult, SuccessRate, TrialResult
from mea_ray.sweep.plan import Plan, check_same
from mea_ray.sweep.plan import plan as plan_with
from mea_ray.sweep.search import check_metric, optuna_search, point_of, suggestion_of
from mea_ray.sweep.space import axes, experiment_at, points, probes


def sweep(space: dict[str, Any], search: dict[str, Any] | None = None, **base: Any) -> SweepConfig:
    return build(SweepConfig, {"name": "s", "base": base, "space": space, "search": search or {}})


def plan(config: SweepConfig) -> Plan:
    return plan_with(config, MadeUp())


def test_a_grid_is_every_combination_in_a_fixed_order() -> None:
    config = sweep({"seed": {"grid": [0, 1]}, "thief.budgets": {"grid": [[10], [10, 20]]}})
    assert points(config) == [
        {"seed": 0, "thief.budgets": [10]},
        {"seed": 0, "thief.budgets": [10, 20]},
        {"seed": 1, "thief.budgets": [10]},
        {"seed": 1, "thief.budgets": [10, 20]},
    ]


def test_no_space_is_one_point() -> None:
    assert points(sweep({})) == [{}]


def test_random_draws_for_every_grid_combination_and_again_the_same() -> None:
    space = {
        "seed": {"grid": [0, 1, 2]},
        "thief.training.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "thief.training.momentum": {"uniform": [0.1, 0.2]},
        "thief.training.epochs": {"uniform": [2, 4]},
        "thief.model": {"choice": ["vgg_like", "cnn9"]},
    }
    result = points(sweep(space, {"name": "random", "samples": 40}))
    assert [point["seed"] for point in result] == [0] * 40 + [1] * 40 + [2] * 40
    assert list(result[0]) == list(space)
    rates = [point["thief.training.learning_rate"] for point in result]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates) and len(set(rates)) == 120
    assert 40 < sum(rate < 1e-3 for rate in rates) < 80  # half of it, evenly in the logarithm
    assert all(0.1 <= point["thief.training.momentum"] <= 0.2 for point in result)
    assert {point["thief.training.epochs"] for point in result} == {2, 3, 4}
    assert {point["thief.model"] for point in result} == {"vgg_like", "cnn9"}
    assert result == points(sweep(space, {"name": "random", "samples": 40}))
    assert result != points(sweep(space, {"name": "random", "samples": 40, "seed": 1}))


@pytest.mark.parametrize(
    ("space", "search", "message"),
    [
        ({"thief.trainin.epochs": {"grid": [1]}}, {}, "thief.trainin.*did you mean 'thief.training.epochs'"),
        ({"thief.training.epoch": {"grid": [1]}}, {}, "thief.training.epoch.*did you mean 'thief.training.epochs'"),
        ({"thief.learning.temprature": {"grid": [1]}}, {}, "did you mean 'thief.learning.temperature'"),
        ({"victim.watermark": {"grid": ["none", "mea_defendr"]}}, {}, "did you mean 'mea_defender'"),
        ({"thief.training.epochs": {"grid": [1, 0]}}, {}, "thief.training.epochs=0.*greater than or equal to 1"),
        ({"seed": {"gird": [1]}}, {}, "space.seed: unknown kind 'gird'; did you mean 'grid'"),
        ({"seed": {"grid": []}}, {}, "grid needs a list of values"),
        ({"seed": {"grid": [1], "choice": [2]}}, {}, "expected one of grid, choice"),
        ({"seed": {"grid": [1, 1]}}, {}, "holds a value twice"),
        ({"seed": {"choice": [1, 2]}}, {}, "search.name=random"),
        ({"seed": {"uniform": [5, 1]}}, {"name": "random"}, "low < high"),
        ({"seed": {"uniform": [0.5, 1.5]}}, {"name": "random"}, "whole number"),
        ({"thief.training.learning_rate": {"loguniform": [0, 1]}}, {"name": "random"}, "0 < low"),
        ({"seed.deeper": {"grid": [1]}}, {}, "cannot set 'seed.deeper'"),
        ({"seed": {"grid": list(range(400))}, "victim.seed": {"grid": list(range(400))}}, {}, "160000 points"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_runs(space: Any, search: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(sweep(space, search))


def test_all_problems_of_a_space_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        axes(sweep({"seed": {"gird": [1]}, "victim.seed": {"grid": []}}))
    assert "space.seed" in str(caught.value) and "space.victim.seed" in str(caught.value)


def test_choosing_another_component_drops_the_parameters_of_the_one_before() -> None:
    config = sweep({"thief.model": {"grid": ["cnn9"]}}, thief={"model": {"name": "vgg_like", "width": 0.5}})
    (trial,) = plan(config).trials
    assert trial.config.thief.model.name == "cnn9" and trial.point == {"thief.model": "cnn9"}


def test_a_plan_counts_trials_distinct_models_and_queries() -> None:
    config = sweep(
        {
            "thief.budgets": {"grid": [[100], [100, 300]]},
            "victim.training.epochs": {"grid": [1, 2]},
            "seed": {"grid": [0, 1, 2]},
        },
        verification={"null_models": 2},
    )
    made = plan(config)
    assert made.trial_count == len(made.trials) == 12
    assert made.queries == 6 * 100 + 6 * 300
    assert made.victim_count == len(made.victims) == 2
    assert made.null_count == len(made.nulls) == 4
    assert [(v.trials, v.queries) for v in made.victims.values()] == [(6, 1200), (6, 1200)]
    assert [t.names for t in made.trials] == [Names.of(t.config, fingerprints(t.config)) for t in made.trials]
    assert all(len(set(t.nulls)) == 2 for t in made.trials)
    changes = sum(a.victim != b.victim for a, b in zip(made.trials, made.trials[1:], strict=False))
    assert changes == 1  # trials of one victim stand side by side


def test_a_requerying_attack_is_planned_with_all_that_it_asks() -> None:
    config = sweep({}, thief={"attack": {"name": "distillation", "requery": True}, "budgets": [100, 300]})
    assert plan(config).queries == 400


def test_points_that_are_the_same_experiment_are_run_once() -> None:
    config = sweep({"thief.model": {"grid": ["vgg_like", {"name": "vgg_like"}]}})
    made = plan(config)
    assert made.trial_count == 1 and made.duplicates == 1


def test_a_trial_is_named_by_what_it_is_and_not_by_where_it_runs() -> None:
    here = plan(sweep({})).trials[0].name
    assert here == plan(sweep({}, storage="elsewhere", resources={"trial": {"cpus": 2}})).trials[0].name
    assert here != plan(sweep({}, seed=1)).trials[0].name
    assert here == Names.of(sweep({}).base, fingerprints(sweep({}).base)).trial


def test_resuming_with_another_sweep_file_is_refused(tmp_path: Any) -> None:
    before = plan(sweep({"seed": {"grid": [0, 1, 2]}}))
    before.save(tmp_path / "plan.json")
    check_same(tmp_path / "plan.json", before)
    with pytest.raises(ConfigError, match=r"2 of its 3 trials are no longer in it, 1 are new"):
        check_same(tmp_path / "plan.json", plan(sweep({"seed": {"grid": [0, 7]}})))
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        check_same(tmp_path / "plan.json", before)


def test_an_adaptive_search_is_validated_at_every_value_and_planned_at_its_limits() -> None:
    space = {"thief.training.momentum": {"uniform": [0.1, 0.5]}, "victim.seed": {"grid": [0, 1, 2]}}
    search = {"name": "optuna", "samples": 7}
    config = sweep(space, search, thief={"budgets": [50, 60]})
    assert len(probes(axes(config))) == 4
    made = plan(config)
    assert (made.adaptive, made.trial_count, made.queries, made.victim_count) == (True, 7, 420, 7)
    assert plan(sweep({"seed": {"grid": [0, 1]}}, search)).victim_count == 1
    with pytest.raises(ConfigError, match="momentum=1.5"):
        plan(sweep({"thief.training.momentum": {"uniform": [0.1, 1.5]}}, search))


def test_optuna_receives_finished_trials_and_starts_with_unfinished_ones() -> None:
    config = sweep(
        {
            "thief.training.momentum": {"uniform": [0.1, 0.5]},
            "thief.training.epochs": {"uniform": [1, 9]},
            "thief.model": {"choice": ["vgg_like", {"name": "vgg_like", "width": 0.5}]},
        },
        {"name": "optuna", "samples": 7},
    )
    begun = {
        "thief.training.momentum": 0.25,
        "thief.training.epochs": 3,
        "thief.model": {"name": "vgg_like", "width": 0.5},
    }
    assert suggestion_of(axes(config), begun) == {"p0": 0.25, "p1": 3, "p2": 1}
    assert point_of(config, {"p0": 0.25, "p1": 3, "p2": 1}) == begun
    assert suggestion_of(axes(config), {**begun, "thief.training.epochs": 10}) is None
    folders = sweep({"data": {"grid": [{"name": "parquet", "path": f"/home/ann/v{i}/set"} for i in range(3)]}})
    for place, value in enumerate(axes(folders)[0].values):
        published = portable_point({"data": value})
        assert "ann" not in str(published)
        assert suggestion_of(axes(folders), published) == suggestion_of(axes(folders), {"data": value}) == {"p0": place}
    tried = {**begun, "thief.training.momentum": 0.5, "thief.model": "vgg_like"}
    report = ModelReport(accuracy=0.5, wsr=SuccessRate(successes=4, trials=10, rate=0.4, low=0.2, high=0.6))
    result = TrialResult(
        trial="t", point=tried, config={}, victim="v", victim_report=report, queries_charged=1, seconds=1.0,
        device="cpu", versions={}, rungs=[RungResult(budget=1, queries=1, report=report, epochs=1, seconds=1.0)],
    )  # fmt: skip
    searcher = optuna_search(config, [result], [begun])
    assert point_of(config, searcher.suggest("next")) == begun
    (known,) = searcher.study.get_trials(states=None)[1:2]
    assert known.value == 0.4 and known.params == {"p0": 0.5, "p1": 3, "p2": 0}
    drawn = point_of(config, searcher.suggest("after"))
    experiment_at(config, drawn)
    assert isinstance(drawn["thief.training.epochs"], int) and not math.isnan(drawn["thief.training.momentum"])


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fidelity'"):
        check_metric(sweep({}, {"metric": "fidelty"}))
