from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from mea_ray.config import ExperimentConfig, RoleResources, ServingConfig, build
from mea_ray.core.errors import ArtifactError, ConfigError, ServiceUnavailable
from mea_ray.storage.remote import Storage
from mea_ray.sweep import broker as module
from mea_ray.sweep.broker import Broker, Entry, ServiceSpec, needs
from mea_ray.sweep.cluster import Demand, check


class Services:
    """Stands for `VictimService.start`: counts what is up."""

    def __init__(self) -> None:
        self.up: list[str] = []
        self.started: list[str] = []
        self.failures = 0
        self.began: list[str] = []
        self.may_start = threading.Event()
        self.may_start.set()

    def start(self, folder: str, name: str, settings: ServingConfig, **rest: Any) -> Any:
        self.began.append(name)
        assert self.may_start.wait(60)
        if self.failures:
            self.failures -= 1
            raise ServiceUnavailable("the ledger is held by another process")
        self.up.append(name)
        self.started.append(rest["ledger_path"])

        class Service:
            secret = "s"

            def copy_ledger(inner, path: Any) -> None:  # noqa: N805
                return

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


def until(true: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Wait for something that is true, and return it: services are started and stopped in threads."""
    end = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def got(one: Broker, trial: str, victim: str, **more: Any) -> Entry:
    """Ask until the service is there, as a trial does."""
    entry: Entry = until(lambda: one.acquire(trial, spec(victim), **more))
    return entry


def test_trials_of_one_victim_share_a_service(services: Services) -> None:
    one = broker(services)
    names = {got(one, trial, "v") for trial in ("a", "b", "a")}
    assert len(names) == 1 and len(services.up) == 1
    assert list(one.holders().values()) == [["a", "b"]]


def test_there_is_never_more_than_there_is_room_for(services: Services) -> None:
    one = broker(services, 2)
    assert got(one, "a", "v") and got(one, "b", "w")
    assert one.acquire("c", spec("x")) is None and len(services.up) == 2
    one.release("a")
    assert got(one, "c", "x") and len(services.up) == 2
    assert sorted(holder for holders in one.holders().values() for holder in holders) == ["b", "c"]


def test_a_service_that_nobody_holds_stays_up_until_its_room_is_needed(services: Services) -> None:
    one = broker(services)
    name = got(one, "a", "v")
    one.release("a")
    assert got(one, "b", "v") == name and len(services.started) == 1


def test_a_trial_that_was_killed_does_not_keep_its_service(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOLDER_EXPIRY_S", 0.5)
    one = broker(services)
    assert got(one, "killed", "v")
    end = time.monotonic() + 0.8
    while time.monotonic() < end:
        one.beat("killed")
        assert one.acquire("next", spec("w")) is None
        time.sleep(0.02)
    time.sleep(0.6)
    assert got(one, "next", "w")


def test_a_start_of_100_s_holds_up_no_heartbeat_and_no_other_service(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    class Clock:
        monotonic = staticmethod(lambda: now[0])

    monkeypatch.setattr(module, "time", Clock)
    one = broker(services, 3)
    held = got(one, "living", "v")
    services.may_start.clear()
    assert one.acquire("first", spec("w")) is None and one.acquire("second", spec("x")) is None
    until(lambda: len(services.began) == 3)  # both are being started, at the same time
    for _ in range(100):  # a start of 100 s; the living trial is heard every second, all others every third of one
        now[0] += 1.0
        one.beat("living")
        assert one.acquire("first", spec("w")) is None and one.acquire("second", spec("x")) is None
        assert got(one, "living", "v") == held
    assert list(one.holders().values()) == [["living"]] and services.up == [held.name]
    services.may_start.set()
    assert got(one, "first", "w") and got(one, "second", "x")
    assert len(services.up) == 3 and len(services.began) == 3


def test_one_that_is_stopped_while_it_starts_ends_and_leaves_its_room(services: Services) -> None:
    one = broker(services)
    services.may_start.clear()
    assert one.prepare(spec("v"))
    until(lambda: services.began)
    one.stop()
    services.may_start.set()
    until(lambda: services.started and not services.up)


def test_a_service_that_came_back_keeps_its_ledger(services: Services) -> None:
    one = broker(services)
    first = got(one, "a", "v")
    again = got(one, "a", "v", broken=first.name)
    assert again != first
    until(lambda: len(services.up) == 1)
    assert services.started[0] == services.started[1]
    # A second trial that meets the old one does not take the new one down.
    assert got(one, "b", "v", broken=first.name) == again


def test_a_start_that_fails_is_tried_again_before_the_trial_hears_of_it(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_START_PAUSE_S", 0.0)
    one = broker(services)
    services.failures = 2
    assert got(one, "a", "v") and len(services.began) == 3
    one.release("a")
    services.failures = 100
    with pytest.raises(ServiceUnavailable):
        got(one, "b", "w")
    assert services.failures == 95, "it is told after five starts"


def test_a_victim_that_is_damaged_is_not_started_again_and_again(services: Services) -> None:
    def start(*args: Any, **rest: Any) -> Any:
        services.began.append("v")
        raise ArtifactError("the weights are damaged")

    one = Broker("s", "/ledgers", 1, start=start)
    with pytest.raises(ArtifactError, match="damaged"):
        got(one, "a", "v")
    assert len(services.began) == 1


def test_a_prepared_service_has_no_user_until_the_first_trial_requests_it(services: Services) -> None:
    one = broker(services)
    assert one.prepare(spec("v"))
    until(one.holders)
    (name,) = services.up
    assert one.holders() == {name: []} and one.acquire("a", spec("v")) == (name, "s")


def test_only_what_nobody_holds_is_closed_and_room_that_is_not_needed_is_given_back(services: Services) -> None:
    one = Broker("s", "/ledgers", 3, ["group 1", "group 2", "group 3"], start=services.start)
    got(one, "a", "v")
    key = spec("v").key
    assert not one.close(key)
    assert one.shrink(2) and one.shrink(2) == []
    one.release("a")
    assert one.close(key)
    until(lambda: not services.up)
    assert until(lambda: one.shrink(1)) and got(one, "b", "w")


def test_a_ledger_goes_to_a_remote_storage_before_its_service_is_stopped(services: Services, tmp_path: Any) -> None:
    kept: list[tuple[str, str]] = []
    one = Broker("s", str(tmp_path), 1, start=services.start, keep_ledger=lambda file, name: kept.append((file, name)))
    got(one, "a", "v")
    one.stop()
    assert kept == [(str(tmp_path / f".{spec('v').key}.sqlite.copy"), f"{spec('v').key}.sqlite")]


def test_stop_stops_all(services: Services) -> None:
    one = broker(services, 2)
    got(one, "a", "v")
    got(one, "b", "w")
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
