"""A sweep in Ray's metrics."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_sweep

from mea_ray.sweep import events
from mea_ray.sweep.metrics import SLOT_STATES, WINDOW_S, SweepMetrics
from mea_ray.sweep.runner import run_sweep
from mea_ray.sweep.schedule import Node, Schedule


class Gauges:
    """Stands in for Ray's gauges."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def __call__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        assert description and tag_keys[0] == "sweep"
        known = self.values

        class Gauge:
            def set_default_tags(self, tags: dict[str, str]) -> Any:
                assert tags == {"sweep": "s"}
                return self

            def set(self, value: float, tags: dict[str, str] | None = None) -> None:
                known[(name.removeprefix("mea_ray_"), *(tags or {}).values())] = value

        return Gauge()


def started(trial: str) -> events.TrialStarted:
    return events.TrialStarted(trial, {}, 1, "node", (1000,), 0)


def test_queries_budget_and_trials_follow_the_events() -> None:
    gauges, now = Gauges(), [100.0]
    metrics = SweepMetrics("s", gauges, lambda: now[0])
    for trial in ("a", "b"):
        metrics.follow(started(trial))
    metrics.follow(events.Queried("a", 400, 1000))
    assert gauges.values["queries_per_second",] == 0, "answers of an earlier process are none of this second"
    metrics.follow(events.Queried("a", 550, 1000))
    metrics.follow(events.Queried("b", 0, 500))
    assert gauges.values["queries_per_second",] == pytest.approx(150 / WINDOW_S)
    assert gauges.values["budget_left",] == 450 + 500
    now[0] += WINDOW_S + 1
    metrics.update()
    assert gauges.values["queries_per_second",] == 0
    metrics.follow(events.TrialFinished("a", "x"))
    metrics.follow(events.TrialFailed("b", "y"))
    assert [gauges.values["trials", state] for state in ("running", "finished", "failed")] == [0, 1, 1]
    assert gauges.values["budget_left",] == 0


def test_slots_say_why_nothing_runs_in_them() -> None:
    trials = [Node("a", "s1", ("v1",)), Node("b", "s1", ("v1",)), Node("c", "s2", ("v2",))]
    schedule = Schedule(trials, services=2, slots=4)

    def states(*up: str) -> dict[str, int]:
        found = schedule.slot_states(up)
        assert sum(found.values()) == 4 and found.keys() <= set(SLOT_STATES)
        return {state: count for state, count in found.items() if count}

    assert states() == {"waiting for models": 3, "no trial left": 1}
    schedule.model_ready("v1")
    assert states() == {"waiting for a service": 2, "waiting for models": 1, "no trial left": 1}
    assert states("s1") == {"free": 2, "waiting for models": 1, "no trial left": 1}
    assert schedule.next_trial(["s1"]) == "a"
    assert states("s1") == {"busy": 1, "free": 1, "waiting for models": 1, "no trial left": 1}
    gauges = Gauges()
    SweepMetrics("s", gauges).slots(schedule.slot_states(["s1"]))
    assert gauges.values["slots", "busy"] == 1 and gauges.values["slots", "waiting for a service"] == 0


@pytest.mark.slow
def test_ray_exports_them_to_prometheus(tmp_path: Path, ray_session: None) -> None:
    import ray

    run_sweep(tiny_sweep(tmp_path, space={}))
    port = ray.nodes()[0]["MetricsExportPort"]
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.startswith("ray_mea_ray_")]
        finished = [line for line in lines if line.startswith("ray_mea_ray_trials") and 'state="finished"' in line]
        if finished and finished[0].endswith(" 1.0"):
            break
        time.sleep(1)
    assert finished and 'sweep="s"' in finished[0]
    for name in ("queries_per_second", "budget_left", "slots"):
        assert any(line.startswith(f"ray_mea_ray_{name}{{") for line in lines), lines
