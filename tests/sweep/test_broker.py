from __future__ import annotations

import time
from typing import Any

import pytest

from mea_ray.config import ExperimentConfig, RoleResources, ServingConfig, build
from mea_ray.core.errors import ConfigError, ServiceUnavailable
from mea_ray.storage.remote import Storage
from mea_ray.sweep import broker as module
from mea_ray.sweep.broker import Broker, ServiceSpec, needs
from mea_ray.sweep.cluster import Demand, check


class Services:
    """Stands for `VictimService.start`: counts what is up."""

    def __init__(self) -> None:
        self.up: list[str] = []
        self.started: list[str] = []
        self.failures = 0

    def start(self, folder: str, name: str, settings: ServingConfig, **rest: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise ServiceUnavailable("the ledger is held by another process")
        self.up.append(name)
        self.started.append(rest["ledger_path"])

        class Service:
            secret = "s"

            def stop(inner) -> None:  # noqa: N805
                self.up.remove(name)

        return Service()


def spec(victim: str) -> ServiceSpec:
    return ServiceSpec(victim, f"/victims/{victim}", ServingConfig())


@pytest.fixture
def services() -> Services:
    return Services()


def broker(services: Services, max_services: int = 1) -> Broker:
    return Broker("s", "/ledgers", max_services, start=services.start)


def test_trials_of_one_victim_share_a_service(services: Services) -> None:
    one = broker(services)
    names = {one.acquire(trial, spec("v")) for trial in ("a", "b", "a")}
    assert len(names) == 1 and len(services.up) == 1
    assert list(one.holders().values()) == [["a", "b"]]


def test_there_is_never_more_than_there_is_room_for(services: Services) -> None:
    one = broker(services, 2)
    assert one.acquire("a", spec("v")) and one.acquire("b", spec("w"))
    assert one.acquire("c", spec("x")) is None and len(services.up) == 2
    one.release("a")
    assert one.acquire("c", spec("x")) and len(services.up) == 2
    assert sorted(holder for holders in one.holders().values() for holder in holders) == ["b", "c"]


def test_a_service_that_nobody_holds_stays_up_until_its_room_is_needed(services: Services) -> None:
    one = broker(services)
    name = one.acquire("a", spec("v"))
    one.release("a")
    assert one.acquire("b", spec("v")) == name and len(services.started) == 1


def test_a_trial_that_was_killed_does_not_keep_its_service(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOLDER_EXPIRY_S", 0.2)
    one = broker(services)
    assert one.acquire("killed", spec("v"))
    end = time.monotonic() + 0.4
    while time.monotonic() < end:
        one.beat("killed")
        assert one.acquire("next", spec("w")) is None
        time.sleep(0.02)
    time.sleep(0.25)
    assert one.acquire("next", spec("w"))


def test_a_service_that_came_back_keeps_its_ledger(services: Services) -> None:
    one = broker(services)
    first = one.acquire("a", spec("v"))
    assert first is not None
    again = one.acquire("a", spec("v"), broken=first.name)
    assert again not in {None, first} and len(services.up) == 1
    assert services.started[0] == services.started[1]
    # A second trial that meets the old one does not take the new one down.
    assert one.acquire("b", spec("v"), broken=first.name) == again


def test_a_start_that_fails_is_tried_again_before_the_trial_hears_of_it(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_START_PAUSE_S", 0.0)
    one = broker(services)
    services.failures = 2
    assert [one.acquire("a", spec("v")) is None for _ in range(3)] == [True, True, False]
    services.failures = 100
    with pytest.raises(ServiceUnavailable):
        for _ in range(20):
            one.acquire("b", spec("w"))
            one.release("a")


def test_a_prepared_service_is_held_by_nobody_and_used_by_the_first_that_asks(services: Services) -> None:
    one = broker(services)
    one.prepare(spec("v"))
    (name,) = services.up
    assert one.holders() == {name: []} and one.acquire("a", spec("v")) == (name, "s")


def test_stop_stops_all(services: Services) -> None:
    one = broker(services, 2)
    one.acquire("a", spec("v"))
    one.acquire("b", spec("w"))
    one.stop()
    assert services.up == []


def test_equal_settings_share_and_the_clients_part_does_not_count() -> None:
    def of(**service: Any) -> str:
        return ServiceSpec.of(build(ExperimentConfig, {"service": service}), "v", Storage("/v")).key

    assert of() == of(request_images=8, retries=1)
    assert of() != of(policy="label_only")


def test_needs_are_the_largest_of_all_experiments() -> None:
    small = build(ExperimentConfig, {"service": {"cpus_per_replica": 0.5}})
    wide = build(ExperimentConfig, {"service": {"replicas": 3, "cpus_per_replica": 0.25}})
    assert needs([small, small], 4) == (1, {"CPU": 0.5}, 1)
    assert needs([small, wide], 4) == (2, {"CPU": 0.5}, 3)
    assert needs([small, wide], 1)[0] == 1


def test_a_cluster_that_is_too_small_is_refused_with_numbers_and_a_remedy() -> None:
    role = RoleResources()
    demand = Demand(services=2, replica={"CPU": 0.5}, replicas=2, trial=role, victim=role)
    assert check(demand, {"CPU": 4.0}) == 2
    assert check(demand, {"CPU": 3.0}) == 1
    with pytest.raises(ConfigError, match=r"needs 3 CPUs, the cluster has 2: 2 services x 2 replicas x 0.5") as caught:
        check(demand, {"CPU": 2.0})
    assert "service.cpus_per_replica" in str(caught.value) and "--address" in str(caught.value)
    greedy = Demand(1, {"CPU": 1.0}, 1, role, RoleResources(cpus=8))
    with pytest.raises(ConfigError, match="training a victim needs 8 CPUs, the cluster has 4"):
        check(greedy, {"CPU": 4.0})
    with pytest.raises(ConfigError, match="needs 1 GPUs, the cluster has 0"):
        check(Demand(1, {"GPU": 0.5}, 1, RoleResources(gpus=0.5), role), {"CPU": 4.0})
