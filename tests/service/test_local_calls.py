"""Calls over a Unix socket: outcomes, broken connections, other users; a replica that charges a lone image that way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_service import InProcess, images, save_victim

from mea_ray.blackbox.ledger import Charge
from mea_ray.blackbox.policies import Response
from mea_ray.blackbox.query_log import log_entry
from mea_ray.core.errors import OverBudget, StorageUnavailable
from mea_ray.service.accounts import new_secret
from mea_ray.service.ledger_actor import LedgerActor
from mea_ray.service.local_calls import LocalCaller, LocalServer, _framed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract sockets")


SECRET = new_secret()


def fail(what: str) -> None:
    raise OverBudget("alice", 1, 0, 5) if what == "budget" else StorageUnavailable("x", "full", 1.0, "no space")


@pytest.fixture
def server() -> Iterator[LocalServer]:
    started = LocalServer({"double": lambda x: 2 * x, "fail": fail}, SECRET)
    yield started
    started.close()


def test_outcomes_and_errors_are_those_of_the_method(server: LocalServer) -> None:
    async def calls() -> None:
        caller = LocalCaller(server.address, SECRET)
        array = np.random.default_rng(0).random((300, 3, 32, 32), dtype=np.float32)  # more than one packet
        assert np.array_equal(await caller.call("double", array), 2 * array)
        with pytest.raises(OverBudget) as refused:
            await caller.call("fail", "budget")
        assert refused.value.budget == 5
        with pytest.raises(StorageUnavailable):
            await caller.call("fail", "storage")
        with pytest.raises(KeyError):
            await caller.call("close")  # not offered
        assert await caller.call("double", "ab") == "abab"
        caller.close()

    asyncio.run(calls())


def test_a_call_that_was_given_up_leaves_no_answer_for_the_next_one(server: LocalServer) -> None:
    waiting, free = threading.Event(), threading.Event()

    def wait() -> str:
        waiting.set()
        free.wait(30)
        return "late"

    server._methods["wait"] = wait

    async def calls() -> None:
        caller = LocalCaller(server.address, SECRET)
        call = asyncio.ensure_future(caller.call("wait"))
        await asyncio.get_running_loop().run_in_executor(None, waiting.wait, 30)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        free.set()
        with pytest.raises(OSError):
            await caller.call("double", 1)
        assert await LocalCaller(server.address, SECRET).call("double", 1) == 2

    asyncio.run(calls())


def test_a_server_that_dies_ends_the_call() -> None:
    script = (
        "import os, sys; from mea_ray.service.local_calls import LocalServer\n"
        "print(LocalServer({'die': lambda: os._exit(1)}, sys.argv[1]).address, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script, SECRET], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()

        async def call() -> None:
            await LocalCaller(address, SECRET).call("die")

        with pytest.raises((EOFError, OSError)):
            asyncio.run(call())
    with pytest.raises(OSError):
        LocalCaller(address, SECRET)


def test_another_user_is_refused_on_both_sides(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="belongs to user"):
        LocalCaller(server.address, SECRET)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain, contextlib.suppress(ConnectionError):
        plain.connect(f"\0{server.address}")
        plain.sendall(_framed(SECRET.encode() + pickle.dumps(("double", (1,)))))
        assert plain.recv(1) == b"", "it was answered"


def test_nothing_is_unpickled_without_the_secret(server: LocalServer, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for prefix in (b"", b"0" * 64, SECRET[:-1].encode() + b"x"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plain, contextlib.suppress(ConnectionError):
            plain.connect(f"\0{server.address}")
            plain.sendall(_framed(prefix + pickle.dumps(Bomb())))
            assert plain.recv(1) == b"", "it was answered"
    assert not (tmp_path / "ran").exists()


def test_threads_and_the_actor_itself_charge_exactly(tmp_path: Path) -> None:
    secret = new_secret()
    ledger = LedgerActor(str(tmp_path / "ledger.sqlite"), None, {}, secret)
    ledger.register(secret, "alice", 150)
    address = ledger.local_address(secret) or ""
    assert address and ledger.local_address(secret) == address
    refused, nothing = [0, 0, 0, 0], Response(np.ones((1, 10), np.float32), np.zeros(1, bool), np.zeros(1, bool))

    def over_socket(index: int) -> None:
        async def calls() -> None:
            caller = LocalCaller(address, secret)
            for number in range(50):
                charge = Charge("alice", f"{number}-{index}", 1, "0" * 64)
                note = log_entry("alice", charge.request_id, images(1), nothing, "probabilities", 10)
                (outcome,), noted = await caller.call("charge_and_note", secret, [charge], [note])
                refused[index] += isinstance(outcome, OverBudget)
                assert noted

        asyncio.run(calls())

    threads = [threading.Thread(target=over_socket, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for number in range(50):
        (outcome,) = ledger.charge_many(secret, [Charge("alice", f"{number}-3", 1, "0" * 64)])
        refused[3] += isinstance(outcome, OverBudget)
    for thread in threads:
        thread.join()
    assert ledger.charged(secret, "alice") == 150 and sum(refused) == 50
    assert ledger.seen(secret, "alice").requests == 150 - (50 - refused[3]), "what is paid for is logged"
    ledger.close()


@pytest.fixture
def service(tmp_path: Path) -> InProcess:
    return InProcess(save_victim(tmp_path / "victim"), tmp_path / "state")


def ask(service: InProcess, queries: list[np.ndarray]) -> list[np.ndarray]:
    service.keys.add("alice")

    async def asking() -> list[np.ndarray]:
        await service.engine.set_limits(service.keys.list())
        return [await service.engine.answer("alice", f"{number}-x", query) for number, query in enumerate(queries)]

    return asyncio.run(asking())


def test_a_lone_image_is_charged_over_the_socket_and_through_ray_if_it_breaks(
    service: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = [images(1, seed) for seed in range(3)]
    called: list[str] = []
    original = LocalCaller.call

    async def counted(self: LocalCaller, name: str, *args: Any) -> Any:
        called.append(name)
        if len(called) == 2:  # the ledger charges, and the connection breaks before it can say so
            await original(self, name, *args)
            raise ConnectionResetError
        return await original(self, name, *args)

    monkeypatch.setattr(LocalCaller, "call", counted)
    answers = ask(service, queries)
    expected = service.engine._replica._passes.answer(queries)
    assert all(np.array_equal(got, right) for got, right in zip(answers, expected, strict=True))
    assert called == ["charge_and_note"] * 2, "after a broken connection it is Ray's turn for a while"
    assert service.charged("alice") == 3
    (row,) = service.ledger.usage(service.secret, 10)
    assert row["charged"] == row["log"]["images"] == 3


def test_without_local_calls_all_goes_through_ray(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalServer, "start", lambda methods, secret: None)
    ask(service, [images(1), images(1, 1)])
    assert service.charged("alice") == 2
