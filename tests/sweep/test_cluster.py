from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from typing import Any

import pytest

from mea_ray.config import RoleResources
from mea_ray.sweep import cluster


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
def test_the_services_room_is_asked_for_as_placed(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("ray.util.placement_group")  # the package has a function of this name
    queried: list[tuple[list[dict[str, float]], str]] = []

    def refuse(bundles: list[dict[str, float]], strategy: str) -> None:
        queried.append((bundles, strategy))
        raise InterruptedError

    monkeypatch.setattr(module, "placement_group", refuse)
    role = RoleResources()
    demand = cluster.Demand(1, {"CPU": 0.5}, 2, role, role, placement)  # type: ignore[arg-type]
    with pytest.raises(InterruptedError), cluster.services_group(demand):
        pass
    assert queried == [([{"CPU": 0.5}, {"CPU": 0.5}], placement.upper())]
