"""One image while nothing else is under way: computed first, then charged and noted at once, answered only if paid."""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from http_service import InProcess, images, save_victim
from starlette.requests import Request

from mea_ray.core.errors import StorageUnavailable
from mea_ray.service.http.small_bodies import SendWithHead, received


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.fixture
def service(tmp_path: Path) -> InProcess:
    return InProcess(save_victim(tmp_path / "victim"), tmp_path)


def ask(service: InProcess, key: str, count: int, at_once: int = 1) -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        async with service.client(key) as client:
            headers = {"Content-Type": "application/x-npy"}
            bodies = [npy(images(count, seed)) for seed in range(at_once)]
            return await asyncio.gather(*(client.post("/v1/predict", content=b, headers=headers) for b in bodies))

    return asyncio.run(all_of_them())


def calls(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that the calls to the ledger are noted in."""
    seen: list[str] = []
    for name in ("charge_many", "charge_and_note", "note"):
        real = getattr(service.ledger, name)

        def noted(*args: Any, real: Any = real, name: str = name) -> Any:
            seen.append(name)
            return real(*args)

        monkeypatch.setattr(service.ledger, name, noted)
    return seen


def test_one_call_to_the_ledger_is_enough(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    key, seen = service.keys.add("alice"), calls(service, monkeypatch)
    (response,) = ask(service, key, 1)
    assert response.status_code == 200 and seen == ["charge_and_note", "charge_many"]
    assert service.charged("alice") == service.ledger.usage(service.secret, 10)[0]["log"]["images"] == 1
    seen.clear()
    assert ask(service, key, 5)[0].status_code == 200, "more than the smallest pass holds"
    assert seen == ["charge_many", "note"]


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_pass_needs_no_other_thread_and_gives_the_same_answer(
    service: InProcess, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    replica, threads = service.engine._replica, set()
    assert replica._is_quick, "the pass of a tiny network"
    whole = ask(service, service.keys.add("merged"), 32)[0].json()["predictions"][0]
    real = replica._passes.respond

    def respond(parts: Any) -> Any:
        threads.add(threading.get_ident())
        return real(parts)

    monkeypatch.setattr(replica, "_is_quick", quick)
    monkeypatch.setattr(replica._passes, "respond", respond)
    (response,) = ask(service, service.keys.add("alice"), 1)
    assert response.status_code == 200 and service.charged("alice") == 1
    assert response.json()["predictions"][0] == whole, "the same image among 32: the same bits"
    assert (threads == {threading.get_ident()}) is quick


def test_a_spent_budget_is_refused_not_logged_and_computed_for_once(
    service: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, seen = service.keys.add("alice", budget=0), calls(service, monkeypatch)
    passes = service.engine._replica._passes
    before = passes.passes
    for _ in range(5):
        (response,) = ask(service, key, 1)
        assert response.status_code == 402 and service.charged("alice") == 0
    assert service.ledger.usage(service.secret, 10)[0]["log"]["requests"] == 0
    assert passes.passes == before + 1, "a client that was refused is charged before anything is computed"
    service.keys.limit("alice", budget=2)
    seen.clear()
    assert [ask(service, key, 1)[0].status_code for _ in range(2)] == [200, 200]
    assert service.charged("alice") == service.ledger.usage(service.secret, 10)[0]["log"]["images"] == 2
    assert seen == ["charge_many", "note", "charge_and_note", "charge_many"], "once it has paid, it is as any other"


def test_a_log_whose_disk_is_full_is_waited_for(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    key, real = service.keys.add("alice"), service.ledger._log.add
    failed: list[int] = []

    def full_once(notes: Any) -> None:
        if not failed:
            failed.append(1)
            raise StorageUnavailable("/disk", "full", 0.0, "full")
        real(notes)

    monkeypatch.setattr(service.ledger._log, "add", full_once)
    (response,) = ask(service, key, 1)
    assert response.status_code == 200 and failed
    assert service.charged("alice") == service.ledger.usage(service.secret, 10)[0]["log"]["images"] == 1


def test_many_lone_images_at_once_are_merged(service: InProcess) -> None:
    key = service.keys.add("alice")
    responses = ask(service, key, 1, at_once=9)
    assert {response.status_code for response in responses} == {200} and service.charged("alice") == 9
    alone = [ask(service, key, 1)[0].json()["predictions"][0] for _ in range(1)]
    assert responses[0].json()["predictions"][0] == alone[0], "the same bits, however it was merged"


def test_a_small_body_travels_with_the_head() -> None:
    """What Ray Serve's proxy wraps itself in, and what a replica reads, one behind the other."""
    app = FastAPI()
    heads: list[bool] = []

    @app.post("/")
    async def length(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    async def replica(scope: Any, receive: Any, send: Any) -> None:
        heads.append("mea_ray.body" in scope)
        await app(scope, received(scope, receive), send)

    async def all_of_them() -> list[int]:
        transport = httpx.ASGITransport(app=SendWithHead(replica))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            sizes = (1, 5000, 64 * 1024, 64 * 1024 + 1, 0)
            lengths = [(await client.post("/", content=b"x" * size)).json()["bytes"] for size in sizes]

            async def parts() -> Any:
                yield b"a"
                yield b"b"

            return [*lengths, (await client.post("/", content=parts())).json()["bytes"]]

    assert asyncio.run(all_of_them()) == [1, 5000, 64 * 1024, 64 * 1024 + 1, 0, 2]
    assert heads == [True, True, True, False, False, False]


def test_a_body_in_parts_is_put_together_and_a_client_that_leaves_is_not_waited_for() -> None:
    async def run(messages: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
        scope: dict[str, Any] = {"type": "http", "headers": [(b"content-length", b"4")]}
        collected: list[Any] = []

        async def receive() -> Any:
            return messages.pop(0)

        async def behind(scope: Any, receive: Any, send: Any) -> None:
            collected.append(scope.get("mea_ray.body"))
            mine = received(scope, receive)
            while (message := await mine())["type"] != "http.disconnect":
                collected.append((message["body"], message.get("more_body", False)))

        async def send(message: Any) -> None:
            pass

        await SendWithHead(behind)(scope, receive, send)
        return scope, collected

    whole: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "body": b"cd"},
        {"type": "http.disconnect"},
    ]
    assert asyncio.run(run(whole))[1] == [b"abcd", (b"abcd", False)]
    left: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert asyncio.run(run(left))[1] == [None, (b"ab", True)]
