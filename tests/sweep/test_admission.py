from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from mea_ray.config import RoleResources
from mea_ray.core.errors import ConfigError
from mea_ray.sweep import admission
from mea_ray.sweep.admission import GATE_EXPIRY_S, AdmissionGate
from mea_ray.sweep.cluster import Demand


def test_one_sweep_at_a_time_looks_for_room_and_a_dead_one_holds_up_nobody() -> None:
    now = [0.0]
    gate = AdmissionGate(clock=lambda: now[0])
    assert gate.enter("a") and gate.enter("a") and not gate.enter("b")
    gate.leave("b")
    assert not gate.enter("b"), "only who is inside can leave"
    gate.leave("a")
    assert gate.enter("b")
    now[0] += GATE_EXPIRY_S - 1
    assert not gate.enter("a") and gate.enter("b"), "heard of again"
    now[0] += GATE_EXPIRY_S - 1
    assert not gate.enter("a")
    now[0] += 2
    assert gate.enter("a") and not gate.enter("b"), "b was not heard of for too long"


class Cluster:
    """Time passes while somebody looks whether there is room; another sweep runs for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, other_until: float, room_from: float) -> None:
        self.now = 0.0
        self.removed: list[Any] = []
        monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(admission, "_groups", lambda bundles, demand: list(range(len(bundles))))
        monkeypatch.setattr(admission, "_others", lambda sweep: ["sweep 'a'"] if self.now < other_until else [])
        monkeypatch.setattr(admission, "_free", lambda: "0 CPUs, 0 GPUs")
        placing = importlib.import_module("ray.util.placement_group")  # the package has a function of this name
        monkeypatch.setattr(placing, "remove_placement_group", self.removed.append)

        def look(groups: list[Any]) -> bool:
            self.now += 2.0
            return self.now >= room_from

        monkeypatch.setattr(admission, "_are_ready", look)

    def wait(self) -> list[str]:
        said: list[str] = []
        demand = Demand(1, {"CPU": 1.0}, 1, RoleResources(), RoleResources())
        admission._wait_for_room(demand, "b", said.append, lambda: None, timeout_s=120.0)
        return said


def test_a_sweep_waits_for_another_however_long_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, other_until=5000.0, room_from=5010.0)
    assert cluster.wait() == [
        "waiting for room for 1 replica of 1 CPU and one trial of 1 CPU: free are 0 CPUs, 0 GPUs; sweep 'a' uses the "
        "cluster"
    ]
    assert cluster.removed, "what looked for room is removed"


def test_without_another_sweep_the_wait_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, other_until=500.0, room_from=float("inf"))
    with pytest.raises(ConfigError, match="no room for 1 replica of 1 CPU and one trial of 1 CPU within 120 s"):
        cluster.wait()
    assert 620 <= cluster.now <= 626 and cluster.removed
