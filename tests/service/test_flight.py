"""Requests under way, when what answers them is short of storage or away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from mea_ray.core.errors import ReplicasAway, ServiceUnavailable, StorageUnavailable
from mea_ray.service import flight
from mea_ray.service.accounts import Account
from mea_ray.service.flight import Request, send_all
from mea_ray.storage.files import PATIENCE, patiently

NAME = "flight/replica/0"


def _replica() -> Any:
    """Defined in here, so that its code travels to the actor."""

    class Replica:
        """Answers with how many images it was asked; some questions meet a full disk first."""

        def __init__(self, full: int, journal: str) -> None:
            self.full, self.journal = full, journal

        def answer(self, account: Any, request_id: str, images: Any) -> Any:
            if self.full:
                self.full -= 1
                raise StorageUnavailable(self.journal, "full", 0.0, "database or disk is full")
            return len(images)

    return ray.remote(Replica)


@pytest.fixture
def replica(ray_session: None, tmp_path: Path) -> Iterator[Any]:
    made: list[Any] = []

    def make(full: int = 0) -> dict[str, Any]:
        options = {"name": NAME, "namespace": "mea_ray", "num_cpus": 0, "max_restarts": -1}
        made.append(_replica().options(**options).remote(full, str(tmp_path / "ledgers" / "a.sqlite")))
        return {NAME: made[0]}

    yield make
    for actor in made:
        ray.kill(actor)


def _fly(handles: dict[str, Any], requests: int = 3, timeout_s: float = 10.0, retries: int = 0) -> list[Any]:
    queries = [Request(str(index), np.zeros((index + 1, 1, 2, 2), np.uint8)) for index in range(requests)]
    return list(
        send_all(queries, [NAME], handles, Account("thief", ""), max_in_flight=2, timeout_s=timeout_s, retries=retries)
    )


def test_a_ledger_whose_disk_is_full_is_waited_for_as_any_file_is(replica: Any, tmp_path: Path) -> None:
    messages: list[str] = []
    marker = tmp_path / "marker"
    marker.touch()
    with PATIENCE.during(30, marker, messages.append):
        assert _fly(replica(full=3)) == [1, 2, 3], "without a failure of the service: there are no retries"
    assert messages == [
        f"storage {tmp_path} is full; waiting for it up to 30 s",
        f"storage {tmp_path} takes files again; going on",
    ]
    tries: list[str] = []

    def once_full() -> None:
        if not tries:
            tries.append("full")
            raise StorageUnavailable("elsewhere", "full", 0.0, "no space")

    again: list[str] = []
    with PATIENCE.during(30, marker, again.append):
        patiently(once_full, tmp_path / "file")
    assert again == messages, "who writes a file says the same, so that the sweep says it once"


def test_a_ledger_whose_disk_stays_full_ends_with_what_to_do(replica: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    with (
        PATIENCE.during(0.5, marker, lambda text: None),
        pytest.raises(StorageUnavailable, match=r"is full and was not back .*--resume") as raised,
    ):
        _fly(replica(full=1000))
    assert raised.value.place == str(tmp_path)


def test_without_a_wait_for_storage_the_error_comes_at_once(replica: Any) -> None:
    with pytest.raises(ServiceUnavailable, match=r"failed 1 times .*is full"):
        _fly(replica(full=1000))


def test_lost_replicas_are_distinguished_from_failing_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    queried: list[float] = []

    def answer(*question: Any) -> object:
        queried.append(time.monotonic())
        return object()

    def restarting(reference: object) -> None:
        raise ray.exceptions.ActorUnavailableError("it is being restarted", None)

    handle = SimpleNamespace(answer=SimpleNamespace(remote=answer))
    monkeypatch.setattr(flight, "find", lambda name: handle)
    monkeypatch.setattr(ray, "wait", lambda references, **how: (references, []))
    monkeypatch.setattr(ray, "get", restarting)
    with pytest.raises(ReplicasAway, match=r"down for 1 s; answers received so far are kept"):
        _fly({NAME: handle}, requests=1, timeout_s=1.0)
    assert 3 <= len(queried) <= 8 and 1.0 < queried[-1] - queried[0] < 5.0, "with pauses that grow"
