"""Reports to Ray Tune within a rung: a scheduler sees the epochs of the victim and of every substitute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from tiny import tiny_sweep

from mea_ray.config import SearchConfig, SweepConfig, build
from mea_ray.results.numbers import METRICS
from mea_ray.sweep import events, search
from mea_ray.sweep.objective import JUDGED
from mea_ray.sweep.reports import Reports
from mea_ray.sweep.runner import run_sweep
from mea_ray.sweep.trial import losses_of

NUMBERS = {**dict.fromkeys(METRICS, 0.5), "wsr": 0.75}


class StopsAt(FIFOScheduler):
    """Stops each trial at a number of rungs and the first epoch after them."""

    def __init__(self, rungs: int, epochs: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rungs, self.epochs = rungs, epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop or go on."""
        late = result["rungs"] == self.rungs and result["epochs"] > self.epochs
        return str(TrialScheduler.STOP if late else TrialScheduler.CONTINUE)


def sent(*, epochs: bool) -> tuple[list[dict[str, float]], Reports]:
    seen: list[dict[str, float]] = []
    return seen, Reports(seen.append, SearchConfig(metric="wsr"), epochs=epochs)


def test_rungs_alone_are_reported_unless_the_sweep_asks_for_more() -> None:
    seen, reports = sent(epochs=False)
    reports.victim([2.0, 1.0])
    reports.epoch(1.5)
    reports.rung(NUMBERS, 4)
    assert seen == [{**NUMBERS, JUDGED: 0.75}]


def test_epochs_are_counted_over_victim_and_rungs_and_carry_the_last_metrics() -> None:
    seen, reports = sent(epochs=True)
    reports.victim([2.0, 1.0])
    reports.epoch(1.5)
    reports.rung(NUMBERS, 1)
    reports.epoch(1.25)
    assert [(each["epochs"], each["rungs"], each["loss"]) for each in seen] == [
        (1, 0, 2.0),
        (2, 0, 1.0),
        (3, 0, 1.5),
        (3, 1, 1.5),
        (4, 1, 1.25),
    ]
    assert all(math.isnan(each["wsr"]) and math.isnan(each[JUDGED]) for each in seen[:3])
    assert seen[4]["wsr"] == seen[4][JUDGED] == 0.75
    assert all({*METRICS, JUDGED} <= each.keys() for each in seen), "Tune refuses a report without a metric it knows"


def test_another_process_counts_on_from_the_epochs_of_finished_rungs() -> None:
    seen, reports = sent(epochs=True)
    reports.victim([2.0])
    reports.rung(NUMBERS, 5)  # an earlier process trained it
    reports.epoch(1.0)
    assert [each["epochs"] for each in seen] == [1, 6, 7]


def test_losses_are_those_of_all_stages_and_what_is_no_number_is_left_out() -> None:
    history = [{"stage": "clean", "loss": 2}, {"stage": "mark", "loss": 1.5}, {"loss": float("nan")}, {"accuracy": 1.0}]
    assert losses_of({"history": history}) == [2.0, 1.5]
    assert losses_of({}) == []


def test_asha_compares_losses_at_equal_epochs() -> None:
    base = {"victim": {"training": {"epochs": 8}}, "thief": {"budgets": [10, 20], "training": {"epochs": 5}}}
    tree = {"name": "x", "base": base, "scheduler": {"name": "asha", "reports": "epoch", "grace_epochs": 3}}
    asha: Any = search.scheduler(build(SweepConfig, tree))
    assert (asha._time_attr, asha.metric, asha._mode, asha._max_t) == ("epochs", "loss", "min", 18)
    assert not asha._stop_last_trials, "a trial that reaches the last epoch has its last rung and removals before it"
    tree["scheduler"] = {"name": "ray.tune.schedulers:MedianStoppingRule", "reports": "epoch"}
    rule: Any = search.scheduler(build(SweepConfig, tree))
    assert (rule._time_attr, rule._metric, rule._mode) == ("epochs", "loss", "min")


@pytest.mark.slow
@pytest.mark.parametrize("rungs", [0, 1])
def test_a_trial_is_stopped_within_a_rung(tmp_path: Path, ray_session: None, rungs: int) -> None:
    more: dict[str, Any] = {
        "space": {"seed": {"grid": [0]}},
        "scheduler": {
            "name": f"{__name__}:StopsAt",
            "reports": "epoch",
            "params": {"rungs": rungs, "epochs": 2 * rungs},  # after the epochs of victim and first rung
        },
    }
    received: list[events.Event] = []
    outcome = run_sweep(tiny_sweep(tmp_path, **more), on_event=received.append)
    (end,) = [event for event in received if isinstance(event, events.TrialFinished)]
    assert end.stopped and not outcome.failed
    queries = [event for event in received if isinstance(event, events.Queried)]
    if rungs:
        (result,) = outcome.results
        assert result.status == "stopped" and len(result.rungs) == 1
    else:
        assert not len(outcome.results) and end.path == "" and not queries, "stopped by its victim's first epoch"
    again = run_sweep(tiny_sweep(tmp_path, **more), resume=True, on_event=received.append)
    assert len(again.results) == rungs and not again.failed
    assert sum(isinstance(event, events.TrialStarted) for event in received) == 1, "it is not begun again"
