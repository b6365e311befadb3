"""What a plan says of the hours and of what stays idle."""

from __future__ import annotations

from typing import Any

import pytest
from golden import MadeUp

from mea_ray.config import SweepConfig, build
from mea_ray.experiment.data import splits_key
from mea_ray.sweep.broker import demand_of
from mea_ray.sweep.cluster import check
from mea_ray.sweep.estimate import Measured, thief_key, victim_key
from mea_ray.sweep.forecast import OVERHEAD_S, START_S, Forecast, forecast
from mea_ray.sweep.plan import plan

VICTIM_S, TRIAL_S = 100.0, 200.0


def seen(
    victims: int, seeds: int, cpus: float, verification: dict[str, Any] | None = None, **more: Any
) -> Forecast | None:
    verification = {"null_models": 1, **(verification or {})}
    base = {"thief": {"budgets": [100]}, "verification": verification, "service": {"cpus_per_replica": 0.5}}
    space = {"victim.seed": {"grid": list(range(victims))}, "seed": {"grid": list(range(seeds))}}
    sweep = build(SweepConfig, {"name": "s", "base": base, "space": space, **more})
    one = sweep.base
    per_victim, per_trial = one.victim.training.epochs * 60, one.thief.training.epochs * 100
    measured = Measured(
        seconds={victim_key(one): VICTIM_S / per_victim, thief_key(one): TRIAL_S / per_trial},
        weights={victim_key(one): 1, thief_key(one): 1},
        sizes={splits_key(one): 60},
    )
    planned = plan(sweep, MadeUp())
    configs = [trial.config for trial in planned.trials]
    total = {"CPU": cpus}
    demand, auto = (demand_of(each, configs).resolved(total) for each in (sweep, sweep.changed(max_services="auto")))
    return forecast(planned, measured, demand, check(demand, total), (auto, check(auto, total)))


def test_the_time_of_one_slot_is_that_of_all_that_is_done_in_it() -> None:
    found = seen(1, 3, cpus=1.5, max_services=1)
    assert found is not None
    assert found.seconds == pytest.approx(2 * VICTIM_S + START_S + 3 * (TRIAL_S + OVERHEAD_S))
    assert found.busy > 0.9 and found.idle == ""


def test_models_that_choose_the_keys_samples_take_time_too() -> None:
    filtered = {"filter": "shadow", "shadow": {"thieves": 2, "null_models": 3}}
    found = seen(1, 3, cpus=1.5, verification=filtered, max_services=1)
    assert found is not None
    assert found.seconds == pytest.approx(7 * VICTIM_S + START_S + 3 * (TRIAL_S + OVERHEAD_S))


def test_few_services_for_many_victims_are_reported_with_what_auto_would_do() -> None:
    found = seen(16, 2, cpus=16, max_services=1)
    assert found is not None and found.busy < 0.5
    assert "since trials of 1 victims run at once; max_services=auto serves" in found.idle
    better = seen(16, 2, cpus=16, max_services="auto")
    assert better is not None and better.seconds < 0.6 * found.seconds


def test_a_cluster_that_a_sweep_cannot_fill_is_reported() -> None:
    found = seen(1, 3, cpus=64)
    assert found is not None and "63 slots are busy" in found.idle and "3 trials do not fill them" in found.idle


def test_the_choices_of_a_running_search_are_not_predicted() -> None:
    search = {"name": "optuna", "samples": 4}
    base = {"thief": {"budgets": [100]}}
    sweep = build(
        SweepConfig, {"base": base, "search": search, "space": {"thief.training.momentum": {"uniform": [0.1, 0.5]}}}
    )
    planned = plan(sweep, MadeUp())
    demand = demand_of(sweep, [sweep.base]).resolved({"CPU": 4.0})
    assert forecast(planned, Measured(seconds={"x": 1.0}), demand, 2, (demand, 2)) is None
