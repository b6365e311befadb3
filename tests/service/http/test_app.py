"""The HTTP API in this process: every kind of body, every refusal, and what each costs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Coroutine
from operator import methodcaller
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from http_service import SHAPE, InProcess, images, save_victim
from PIL import Image

from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import build
from mea_ray.service.http.settings import HttpConfig
from mea_ray.training.checkpoint import load_model

NPY = "application/x-npy"


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_victim(tmp_path_factory.mktemp("victim") / "digits")


@pytest.fixture
def service(victim: Path, tmp_path: Path) -> InProcess:
    return InProcess(victim, tmp_path)


def settings(**changes: Any) -> HttpConfig:
    return build(HttpConfig, changes)


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def picture(values: np.ndarray, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, form)
    return stream.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def lists(values: np.ndarray, **more: Any) -> bytes:
    return json.dumps({"images": values.tolist(), **more}).encode()


def ask(service: InProcess, key: str | None, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    async def asking() -> Any:
        async with service.client(key) as client:
            return await work(client)

    return asyncio.run(asking())


def post(
    service: InProcess, key: str | None, content: bytes, kind: str = NPY, path: str = "/v1/predict", **headers: str
) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response: httpx.Response = ask(
        service, key, lambda client: client.post(path, content=content, headers={"content-type": kind, **named})
    )
    return response


def expected(victim: Path, queries: np.ndarray) -> np.ndarray:
    return LocalBlackBox(load_model(victim)[0]).query(queries)


@pytest.mark.parametrize("count", [1, 3, 33])
def test_answers_have_the_bits_of_the_black_box_in_this_process(service: InProcess, victim: Path, count: int) -> None:
    key = service.keys.add("alice", budget=100)
    response = post(service, key, npy(images(count)), accept=NPY)
    answers = np.load(io.BytesIO(response.content))
    assert response.status_code == 200 and answers.dtype == np.float32
    assert np.array_equal(answers, expected(victim, images(count)))
    assert service.charged("alice") == count


def test_bodies_of_every_type_give_the_same_answer(service: InProcess, victim: Path) -> None:
    key = service.keys.add("alice")
    queries = images(2)
    first, second = (picture(image[0]) for image in queries)
    bodies = {
        "npy": post(service, key, npy(queries)),
        "png": post(service, key, first, "image/png"),
        "lists": post(service, key, lists(queries), "application/json"),
        "floats": post(service, key, lists(queries / 255, dtype="float32"), "application/json"),
        "base64": post(
            service, key, json.dumps({"images": [text(first), text(npy(queries[1]))]}).encode(), "application/json"
        ),
        "form": ask(service, key, lambda client: client.post("/v1/predict", files=[("file", first), ("file", second)])),
    }
    assert {name: response.status_code for name, response in bodies.items()} == dict.fromkeys(bodies, 200)
    right = expected(victim, queries)
    for name, response in bodies.items():
        rows = response.json()["predictions"]
        scores = np.array([row["scores"] for row in rows], np.float32)
        assert np.array_equal(scores, right[: len(rows)]), name
        assert [row["class_name"] for row in rows] == [str(label) for label in right[: len(rows)].argmax(1)]
    assert service.charged("alice") == 11


def test_a_photo_is_brought_to_the_size_of_the_model(service: InProcess) -> None:
    key = service.keys.add("alice")
    grey = np.full((60, 40, 3), 128, np.uint8)
    photo = post(service, key, picture(grey, "JPEG"), "image/jpeg").json()
    plain = post(service, key, npy(np.full((1, *SHAPE), 128, np.uint8))).json()
    assert photo["predictions"] == plain["predictions"]


@pytest.mark.parametrize(
    ("policy", "members"),
    [
        ({"name": "top_k", "k": 2}, {"label", "class_name", "top"}),
        ({"name": "label_only"}, {"label", "class_name"}),
        ({"name": "probabilities"}, {"label", "class_name", "scores"}),
        ({"name": "embedding"}, {"embedding"}),
    ],
)
def test_an_answer_reveals_what_the_policy_reveals(
    victim: Path, tmp_path: Path, policy: dict[str, Any], members: set[str]
) -> None:
    service = InProcess(victim, tmp_path, settings(policy=policy))
    (row,) = post(service, service.keys.add("alice"), npy(images(1))).json()["predictions"]
    assert set(row) == members
    if "top" in row:
        assert len(row["top"]) == 2 and row["top"][0]["score"] >= row["top"][1]["score"]


def bomb() -> bytes:
    """A PNG of a few kilobytes that announces a hundred million pixels."""
    return picture(np.zeros((10_000, 10_000), bool))


REFUSED: dict[str, tuple[bytes, str, int]] = {
    "not JSON": (b"{", "application/json", 400),
    "deep JSON": (b"[" * 100_000, "application/json", 400),
    "unknown member": (b'{"images": [], "label": 1}', "application/json", 422),
    "no images": (b'{"images": []}', "application/json", 422),
    "not base64": (b'{"images": ["%%"]}', "application/json", 400),
    "ragged lists": (b'{"images": [[[[1, 2], [3]]]]}', "application/json", 422),
    "NaN": (lists(np.full((1, *SHAPE), np.nan), dtype="float32"), "application/json", 422),
    "too bright": (lists(np.full((1, *SHAPE), 256)), "application/json", 422),
    "text": (b"hello", "text/plain", 415),
    "no type": (b"hello", "", 415),
    "no image": (b"hello", "image/png", 400),
    "half a PNG": (picture(images(1)[0, 0])[:80], "image/png", 422),
    "many pixels": (bomb(), "image/png", 413),
    "no array": (b"\x93NUMPY\x01\x00", NPY, 400),
    "pickle": (npy(np.array([{"a": 1}], dtype=object)), NPY, 422),
    "short array": (npy(images(2))[:-5], NPY, 400),
    "float64": (npy(images(1) / 255), NPY, 422),
    "other shape": (npy(np.zeros((1, 3, 8, 8), np.uint8)), NPY, 422),
    "empty array": (npy(images(0)), NPY, 422),
    "infinite": (npy(np.full((1, *SHAPE), np.inf, np.float32)), NPY, 422),
    "too many images": (npy(images(1025)), NPY, 422),
    "no form": (b"--x", "multipart/form-data; boundary=y", 400),
    "form without boundary": (b"--x", "multipart/form-data", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_body_is_refused_with_its_code_and_costs_nothing(service: InProcess, name: str) -> None:
    content, kind, status = REFUSED[name]
    key = service.keys.add("alice", budget=10_000)
    response = post(service, key, content, kind)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status and problem["detail"] and "Traceback" not in response.text
    assert ask(service, key, lambda client: client.get("/v1/usage")).json()["charged"] == 0


def test_a_body_that_is_too_large_is_not_read(victim: Path, tmp_path: Path) -> None:
    service = InProcess(victim, tmp_path, settings(max_request_bytes=2048, max_json_bytes=1024))
    key = service.keys.add("alice")
    read = 0

    async def endless() -> Any:
        nonlocal read
        for _ in range(100):
            read += 1000
            yield b"x" * 1000

    async def work(client: httpx.AsyncClient) -> list[int]:
        chunked = await client.post("/v1/predict", content=endless(), headers={"content-type": NPY})
        announced = await client.post("/v1/predict", content=b"x" * 2049, headers={"content-type": NPY})
        as_json = await client.post("/v1/predict", content=b" " * 1025, headers={"content-type": "application/json"})
        elsewhere = await client.post("/v1/quote", content=endless(), headers={"content-type": "application/json"})
        return [each.status_code for each in (chunked, announced, as_json, elsewhere)]

    assert ask(service, key, work) == [413, 413, 413, 413]
    assert read < 200_000, "a body was read to its end"


def test_keys_open_the_door(service: InProcess) -> None:
    key = service.keys.add("alice")
    body = npy(images(1))
    for wrong in (None, "mea_wrong", key[:-1], key + "x"):
        response = post(service, wrong, body)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/usage", "/v1/model"):
        assert ask(service, None, methodcaller("get", path)).status_code == 401
    assert post(service, key, body).status_code == 200
    service.keys.revoke("alice")
    assert post(service, key, body).status_code == 401
    again = service.keys.add("alice")
    assert post(service, key, body).status_code == 401
    assert post(service, again, body).status_code == 200
    assert service.charged("alice") == 2, "a new key goes on with the account"


def test_a_spent_budget_is_a_402_and_may_be_raised_while_the_service_runs(service: InProcess) -> None:
    key = service.keys.add("alice", budget=4)
    assert post(service, key, npy(images(3))).status_code == 200
    refused = post(service, key, npy(images(2)))
    assert (refused.status_code, refused.json()["remaining"], refused.json()["budget"]) == (402, 1, 4)
    assert service.charged("alice") == 3
    service.keys.limit("alice", budget=5)
    assert post(service, key, npy(images(2))).status_code == 200
    service.keys.limit("alice", budget=2)
    assert post(service, key, npy(images(1))).json()["remaining"] == 0
    service.keys.limit("alice", budget=None)
    assert post(service, key, npy(images(1))).status_code == 200


def test_too_fast_is_a_429_that_says_when(service: InProcess) -> None:
    key = service.keys.add("alice", images_per_second=2, burst=2)
    assert post(service, key, npy(images(2))).status_code == 200
    refused = post(service, key, npy(images(2)))
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert 0.5 < refused.json()["retry_after_s"] <= 1
    assert service.charged("alice") == 2


def test_a_repeated_request_is_charged_once(service: InProcess) -> None:
    key = service.keys.add("alice")
    first, second = (post(service, key, npy(images(3)), idempotency_key="order-7", accept=NPY) for _ in range(2))
    assert first.content == second.content and first.headers["idempotency-key"] == "order-7"
    assert service.charged("alice") == 3
    conflict = post(service, key, npy(images(3, seed=1)), idempotency_key="order-7")
    assert (conflict.status_code, service.charged("alice")) == (409, 3)
    assert post(service, key, npy(images(1)), idempotency_key="a b").status_code == 422
    assert post(service, key, npy(images(1)), idempotency_key="x" * 129).status_code == 422


def test_a_quote_counts_what_was_not_charged_before(service: InProcess) -> None:
    key = service.keys.add("alice", budget=10)
    post(service, key, npy(images(3)), idempotency_key="first")
    queries = {"requests": [{"id": "first", "images": 3}, {"id": "second", "images": 4}]}
    quote = ask(service, key, lambda client: client.post("/v1/quote", json=queries)).json()
    assert quote == {"unpaid": 4, "remaining": 7, "budget": 10}
    assert service.charged("alice") == 3


def test_an_answer_of_another_type_is_refused_before_it_is_charged(service: InProcess) -> None:
    key = service.keys.add("alice")
    assert post(service, key, npy(images(1)), accept="text/html").status_code == 406
    assert ask(service, key, lambda client: client.get("/v1/usage")).json()["charged"] == 0


def test_a_ledger_that_is_away_is_a_503(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    key = service.keys.add("alice")
    post(service, key, npy(images(1)))

    def away(*args: Any) -> Any:
        raise OSError("the actor is dead; /secret/path")

    monkeypatch.setattr(service.ledger, "charge_many", away)
    response = post(service, key, npy(images(1)))
    assert response.status_code == 503 and response.headers["retry-after"] and "secret" not in response.text


def test_what_nobody_foresaw_is_a_500_without_a_trace(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    key = service.keys.add("alice")

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(service.engine, "answer", broken)
    response = post(service, key, npy(images(1)))
    assert response.status_code == 500 and response.headers["content-type"] == "application/problem+json"
    assert "secret" not in response.text and "Traceback" not in response.text


def test_the_log_has_neither_keys_nor_images(service: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    key = service.keys.add("alice")
    body = npy(images(2))
    with caplog.at_level("INFO", logger="mea_ray.http"):
        post(service, key, body, path=f"/v1/predict?key={key}")
    assert "POST /v1/predict 200 2 images" in caplog.text
    assert key not in caplog.text and body.decode("latin-1")[-20:] not in caplog.text


def test_other_routes(service: InProcess, victim: Path) -> None:
    key = service.keys.add("alice", budget=7)
    post(service, key, npy(images(2)))
    post(service, key, b"", "text/plain")

    async def work(client: httpx.AsyncClient) -> dict[str, httpx.Response]:
        return {path: await client.get(path) for path in ("/v1/usage", "/v1/model", "/healthz", "/metrics", "/nothing")}

    got = ask(service, key, work)
    usage = got["/v1/usage"].json()
    assert (usage["client"], usage["charged"], usage["remaining"]) == ("alice", 2, 5)
    model = got["/v1/model"].json()
    assert (model["name"], model["image_shape"], len(model["classes"])) == ("digits", [1, 8, 8], 10)
    assert str(victim) not in got["/v1/model"].text
    assert got["/healthz"].json() == {"status": "ok"}
    assert 'mea_ray_requests_total{status="200"} 1.0' in got["/metrics"].text
    assert 'mea_ray_requests_total{status="415"} 1.0' in got["/metrics"].text
    assert "mea_ray_images_total 2.0" in got["/metrics"].text and "alice" not in got["/metrics"].text
    assert got["/nothing"].status_code == 404
    assert got["/nothing"].headers["content-type"] == "application/problem+json"


def test_the_examples_of_the_description_work(service: InProcess) -> None:
    key = service.keys.add("alice")
    described = ask(service, None, lambda client: client.get("/openapi.json")).json()
    body = described["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]
    for name, example in body["examples"].items():
        content = json.dumps(example["value"]).encode()
        assert post(service, key, content, "application/json").status_code == 200, name


def test_images_of_any_client_are_in_the_owners_log_in_their_order(service: InProcess) -> None:
    key = service.keys.add("alice")
    for seed in range(3):
        post(service, key, npy(images(2, seed)))
    log = service.ledger._log.of("alice")
    assert log.requests == 3
    assert np.array_equal(
        np.concatenate([part for part, _ in log.sample]), np.concatenate([images(2, s) for s in range(3)])
    )
    (row,) = service.ledger.usage(service.secret, 10)
    assert (row["client"], row["charged"], row["log"]["images"]) == ("alice", 6, 6)
