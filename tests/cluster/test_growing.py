"""A sweep on a cluster that grows: refused at once, or asking its autoscaler and waiting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from mea_ray.config import RoleResources
from mea_ray.core.errors import ConfigError
from mea_ray.sweep.cluster import Demand, wait_for_room

DEMAND = Demand(
    1, {"CPU": 1.0, "GPU": 0.25}, 2, RoleResources(cpus=1, gpus=0.5), RoleResources(cpus=2, gpus=0.5)
)  # one GPU and three CPUs


@dataclass
class Growing:
    """A head without a GPU; a machine with one comes ``after`` looks, if anybody has asked for it."""

    after: int
    asked: list[list[dict[str, float]]] = field(default_factory=list)
    waited: float = 0.0
    looks: int = 0

    def cluster_resources(self) -> dict[str, float]:
        self.looks += 1
        grown = bool(self.asked) and self.looks > self.after
        return {"CPU": 12.0, "GPU": 1.0} if grown else {"CPU": 4.0}

    def request_resources(self, *, bundles: list[dict[str, float]]) -> None:
        self.asked.append(bundles)

    def sleep(self, seconds: float) -> None:
        self.waited += seconds


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Any:
    cluster = Growing(after=3)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", cluster.request_resources)
    return cluster


def test_a_sweep_asks_for_what_it_needs_first_and_waits(growing: Growing) -> None:
    assert wait_for_room(DEMAND, growing, 600, sleep=growing.sleep) == 1
    replica = {"CPU": 1.0, "GPU": 0.25}
    assert growing.asked == [[replica, replica, {"CPU": 1.0, "GPU": 0.5}, {"CPU": 2.0, "GPU": 0.5}], []]
    assert growing.waited > 0


def test_without_a_wait_the_cluster_is_taken_as_it_is(growing: Growing) -> None:
    with pytest.raises(ConfigError, match="the cluster has 0"):
        wait_for_room(DEMAND, growing, 0, sleep=growing.sleep)
    assert growing.asked == [] and growing.waited == 0


def test_a_cluster_that_does_not_grow_is_refused_and_the_request_taken_back(growing: Growing) -> None:
    growing.after = 10**9
    with pytest.raises(ConfigError, match="GPU"):
        wait_for_room(DEMAND, growing, 0.05, sleep=growing.sleep)
    assert len(growing.asked) == 2 and growing.asked[-1] == []


def test_free_resources_are_not_requested(growing: Growing) -> None:
    small = Demand(0, {}, 1, RoleResources(cpus=1), RoleResources(cpus=1))
    assert wait_for_room(small, growing, 600, sleep=growing.sleep) == 4
    assert growing.asked == []
