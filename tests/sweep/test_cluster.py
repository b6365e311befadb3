from __future__ import annotations

import importlib
import os
import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from mea_ray.config import RoleResources
from mea_ray.core.errors import ConfigError
from mea_ray.sweep import cluster
from mea_ray.sweep.admission import services_groups


@pytest.mark.parametrize("interrupt", [signal.default_int_handler, signal.SIG_IGN], ids=["shell", "script with &"])
def test_sigterm_is_heard_as_ctrl_c_and_only_as_long_as_a_sweep_runs(interrupt: Any) -> None:
    own, before = signal.signal(signal.SIGINT, interrupt), signal.getsignal(signal.SIGTERM)
    try:
        _check_interrupt()
    finally:
        signal.signal(signal.SIGINT, own)
    assert signal.getsignal(signal.SIGTERM) is before


def _check_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), cluster._sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_sweep_in_a_thread_leaves_the_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with cluster._sigterm_as_ctrl_c():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("placement", ["pack", "spread"])
def test_the_services_resources_are_requested_as_placed(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("ray.util.placement_group")  # the package has a function of this name
    queried: list[tuple[list[dict[str, float]], str]] = []

    def refuse(bundles: list[dict[str, float]], strategy: str) -> None:
        queried.append((bundles, strategy))
        raise InterruptedError

    monkeypatch.setattr(module, "placement_group", refuse)
    role = RoleResources()
    demand = cluster.Demand(1, {"CPU": 0.5}, 2, role, role, placement)  # type: ignore[arg-type]
    with pytest.raises(InterruptedError), services_groups(demand):
        pass
    assert queried == [([{"CPU": 0.5}, {"CPU": 0.5}], placement.upper())]


def node(cpus: float, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus}}


@pytest.mark.parametrize(
    ("victim", "nodes", "fits"),
    [
        (1.5, [node(2)], True),
        (2, [node(2)], False),
        (2, [node(2), node(2)], True),  # the one replica is on one of them only
        (2, [node(2), node(2, alive=False)], False),
        (2, [node(2), node(1), node(1)], False),
    ],
)
def test_models_come_first_where_services_leave_no_room_for_them(
    victim: float, nodes: list[dict[str, Any]], fits: bool
) -> None:
    demand = cluster.Demand(1, {"CPU": 0.5}, 1, RoleResources(), RoleResources(cpus=victim))
    assert cluster.has_room_beside_services(demand, nodes) == fits


def test_as_many_models_are_trained_at_once_as_find_room() -> None:
    demand = cluster.Demand(1, {"CPU": 0.5}, 1, RoleResources(cpus=4), RoleResources(cpus=1, gpus=0.5))
    assert cluster.trainings_at_once(demand, {"CPU": 8.0, "GPU": 2.0}) == 4
    assert cluster.trainings_at_once(demand, {"CPU": 8.0}) == 1


@pytest.mark.parametrize(("slow", "starts"), [(0, 1), (1, 2), (9, 2)])
def test_a_ray_that_starts_too_slowly_is_started_once_more(
    slow: int, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    tried = []

    def init(**_: Any) -> None:
        tried.append(1)
        if len(tried) <= slow:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if slow < 2:
        cluster._start_or_join(None, ())
    else:
        with pytest.raises(ConfigError, match="Ray could not be started on this machine: The current node timed out"):
            cluster._start_or_join(None, ())
    assert len(tried) == starts
    tried.clear()
    if slow:
        with pytest.raises(ConfigError, match="could not be joined"):
            cluster._start_or_join("head:6379", ())
        assert len(tried) == 1


@pytest.mark.parametrize(
    ("address", "what"), [(None, "Ray to start on this machine"), ("head:6379", "the Ray cluster at head:6379")]
)
def test_a_slow_start_says_what_is_waited_for(address: str | None, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    logged, said = threading.Event(), list[str]()

    def warning(text: str) -> None:
        said.append(text)
        logged.set()

    monkeypatch.setattr(cluster.logger, "warning", warning)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    cluster._start_or_join(address, ())
    assert not said
    monkeypatch.setattr(cluster, "_SLOW_START_S", 0.01)
    monkeypatch.setattr(ray, "init", lambda **_: logged.wait(60))
    cluster._start_or_join(address, ())
    assert len(said) == 1 and said[0].startswith(f"waiting for {what}") and " CPUs; Ctrl-C ends it" in said[0]


def test_the_processes_of_a_ray_are_not_in_the_group_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray starts them; else `timeout` and `kill %1` would end Ray before the program can end what it does."""
    import ray

    groups: list[int] = []

    def start(**_: Any) -> None:
        with subprocess.Popen(["sleep", "60"], preexec_fn=lambda: None) as process:
            groups.append(os.getpgid(process.pid))
            process.kill()

    monkeypatch.setattr(ray, "init", start)
    cluster._start_or_join(None, ())
    start()
    assert groups[0] != os.getpgrp() == groups[1], "and all that is started later is"
