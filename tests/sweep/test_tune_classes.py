"""Schedulers, searchers and callbacks of Ray Tune by import path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray import tune
from tiny import tiny_sweep

from mea_ray.config import SweepConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.sweep import events, search, tune_classes
from mea_ray.sweep.objective import JUDGED
from mea_ray.sweep.runner import run_sweep

SPACE: dict[str, Any] = {
    "thief.training.learning_rate": {"loguniform": [1e-3, 1e-1]},
    "thief.model.name": {"choice": ["cnn9", "vgg_like"]},
    "thief.training.epochs": {"uniform": [1, 3]},
}
HYPERBAND = "ray.tune.schedulers:HyperBandScheduler"


def sweep(**more: Any) -> SweepConfig:
    known: dict[str, Any] = {"name": "x", "space": SPACE, "search": {"name": "random"}}
    return build(SweepConfig, {**known, **more})


class Counter(tune.Callback):
    """Counts what it is called with."""

    seen: ClassVar[list[str]] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.seen.append(trial.trial_id)


def test_what_the_user_left_open_is_ours() -> None:
    made: Any = search.scheduler(sweep(scheduler={"name": HYPERBAND, "params": {"max_t": 9}}))
    assert type(made).__name__ == "HyperBandScheduler"
    assert (made._metric, made._time_attr, made._max_t_attr) == (JUDGED, "training_iteration", 9)
    other: Any = search.scheduler(sweep(scheduler={"name": HYPERBAND, "params": {"metric": "accuracy", "mode": "min"}}))
    assert other._metric == "accuracy"


def test_a_space_is_given_in_the_terms_of_tune() -> None:
    given = tune_classes.space(sweep())
    assert isinstance(given["p0"], tune.search.sample.Float) and (given["p0"].lower, given["p0"].upper) == (1e-3, 1e-1)
    assert given["p1"].categories == [0, 1]
    drawn = {given["p2"].sample() for _ in range(100)}
    assert drawn == {1, 2, 3}, "both ends of a range can be drawn"
    with pytest.raises(ConfigError, match="needs a space"):
        tune_classes.space(sweep(space={}))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scheduler": {"name": "ray.tune.schedulers:PopulationBasedTraining"}}, "copies the state of one trial"),
        ({"scheduler": {"name": HYPERBAND, "params": {"mx": 9}}}, r"mx.*it takes time_attr, metric"),
        ({"scheduler": {"name": HYPERBAND}, "max_concurrent_trials": 2}, "may never start; leave it out"),
        ({"scheduler": {"name": "json:JSONDecoder"}}, "derives from Ray Tune's TrialScheduler"),
        ({"search": {"name": "ray.tune.search:nothing", "samples": 2}}, "search.name.*no 'nothing'"),
        ({"callbacks": ["json:JSONDecoder"]}, r"callbacks\.0=json:JSONDecoder"),
        ({"stop": {"wrs": 0.9}}, "did you mean 'wsr'"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_starts(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_sweep(tiny_sweep(tmp_path, **more))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"scheduler": {"name": "ahsa"}}, "did you mean 'asha'"),
        ({"scheduler": {"name": "asha", "params": {"max_t": 3}}}, "reduction_factor"),
        ({"search": {"name": "random", "params": {"seed": 1}}}, "imported searcher"),
        ({"time_budget_s": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(**more)


@pytest.mark.slow
def test_hyperband_pauses_trials_and_a_callback_and_a_searcher_of_tune_are_used(
    tmp_path: Path, ray_session: None
) -> None:
    Counter.seen.clear()
    more: dict[str, Any] = {
        "space": {"thief.training.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "search": {
            "name": "ray.tune.search.optuna:OptunaSearch",
            "samples": 3,
            "metric": "accuracy",
            "params": {"seed": 1},
        },
        "scheduler": {"name": HYPERBAND, "params": {"max_t": 2, "reduction_factor": 2}},
        "callbacks": [f"{__name__}:Counter"],
    }
    outcome = run_sweep(tiny_sweep(tmp_path, **more))
    results = list(outcome.results)
    assert len(results) == 3 and not outcome.failed
    assert all(result.rungs and result.answers_stored == result.queries_charged for result in results)
    assert len(Counter.seen) == 3
    assert outcome.grid is not None and len(outcome.grid) == 3
    best = outcome.grid.get_best_result("accuracy", "max").metrics
    assert best is not None and best["accuracy"] == max(result.rungs[-1].report.accuracy for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["random", "ray.tune.search.optuna:OptunaSearch"])
def test_hyperband_fills_groups_that_are_larger_than_what_runs_at_once(
    searcher: str, tmp_path: Path, ray_session: None
) -> None:
    more: dict[str, Any] = {
        "space": {"thief.training.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "search": {"name": searcher, "samples": 9, "metric": "accuracy"},
        "scheduler": {"name": HYPERBAND, "params": {"max_t": 3, "reduction_factor": 3}},
    }
    tree = tiny_sweep(tmp_path, **more).model_dump()
    tree["base"]["thief"]["budgets"] = [16, 32, 48]
    outcome = run_sweep(build(SweepConfig, tree))
    rungs = sorted(len(result.rungs) for result in outcome.results)
    assert len(rungs) == 9 and not outcome.failed
    assert rungs[0] == 1 and rungs[-1] == 3, rungs  # it stopped some early, and let the best go on to the end


@pytest.mark.slow
def test_a_spent_time_budget_leaves_trials_to_resume(tmp_path: Path, ray_session: None) -> None:
    space = {"seed": {"grid": [0, 1, 2]}}
    received: list[events.Event] = []
    first = run_sweep(
        tiny_sweep(tmp_path, space=space, time_budget_s=0.5, max_concurrent_trials=1), on_event=received.append
    )
    assert len(first.results) < 3 and not first.failed
    assert any(
        isinstance(event, events.Warned) and "time budget of 0.5 s is used up" in event.message for event in received
    )
    second = run_sweep(tiny_sweep(tmp_path, space=space), resume=True)
    assert len(second.results) == 3 and not second.failed
    assert all(result.status == "finished" for result in second.results)


@pytest.mark.slow
def test_a_stop_criterion_ends_a_trial_at_its_rung(tmp_path: Path, ray_session: None) -> None:
    (result,) = run_sweep(tiny_sweep(tmp_path, space={}, stop={"training_iteration": 1})).results
    assert result.status == "stopped" and len(result.rungs) == 1
