"""The client of an HTTP service, against a server that fails in every way, and against foreign APIs."""

from __future__ import annotations

import base64
import io
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from mea_ray.blackbox.foreign import IMAGE, IMAGES, ForeignApi, ForeignWire, load_api
from mea_ray.blackbox.http import HttpBlackBox
from mea_ray.config import ClientConfig, build
from mea_ray.core.errors import BadQuery, ConfigError, OverBudget, RequestConflict, ServiceUnavailable, UnknownClient

SHAPE = (1, 4, 4)
Reply = Callable[[httpx.Request], httpx.Response | None]


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)


def answers(queries: np.ndarray) -> np.ndarray:
    """Three numbers that tell each image from all others."""
    flat = queries.reshape(len(queries), -1).astype(np.float32)
    return np.stack([flat[:, 0], flat[:, 1], flat[:, 2]], axis=1) / 255


class Server:
    """A service of mea-ray serve that charges by id, and does first what ``reply`` says."""

    def __init__(self, reply: Reply = lambda request: None, budget: int | None = None) -> None:
        self.reply, self.budget = reply, budget
        self.charged: dict[str, int] = {}
        self.asked: list[str] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.handle)

    def box(self, **more: Any) -> HttpBlackBox:
        settings = ClientConfig(request_images=2, max_in_flight=3, request_timeout_s=0.5, retries=2)
        self.slept: list[float] = []
        given = {"settings": settings, "transport": self.transport, "sleep": self.slept.append, **more}
        return HttpBlackBox("http://test", "key", **given)

    def handle(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer key"
        left = None if self.budget is None else self.budget - sum(self.charged.values())
        if request.url.path == "/v1/model":
            return httpx.Response(200, json={"image_shape": SHAPE, "answer_length": 3, "max_request_images": 5})
        if request.url.path == "/v1/usage":
            return httpx.Response(200, json={"client": "alice", "remaining": left})
        if request.url.path == "/v1/quote":
            queries = json.loads(request.content)["requests"]
            unpaid = sum(each["images"] for each in queries if each["id"] not in self.charged)
            return httpx.Response(200, json={"unpaid": unpaid, "remaining": left, "budget": self.budget})
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            name = request.headers["idempotency-key"]
            self.asked.append(name)
        try:
            refused = self.reply(request)
            if refused is not None:
                return refused
            queries = np.load(io.BytesIO(request.content))
            with self._lock:
                self.charged[name] = len(queries)
            stream = io.BytesIO()
            np.save(stream, answers(queries))
            return httpx.Response(200, content=stream.getvalue())
        finally:
            with self._lock:
                self._at_once -= 1


def problem(code: int, **more: Any) -> httpx.Response:
    return httpx.Response(code, json={"status": code, "detail": f"problem {code}", **more})


def failing(times: int, what: Any) -> Reply:
    """Fail the first requests with a response or an exception."""
    left = [times]

    def reply(request: httpx.Request) -> httpx.Response | None:
        if left[0] == 0:
            return None
        left[0] -= 1
        if isinstance(what, Exception):
            raise what
        assert isinstance(what, httpx.Response)
        return what

    return reply


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_answers_in_order_with_bounded_flight(dtype: str) -> None:
    server = Server()
    box = server.box()
    queries = images(11) if dtype == "uint8" else (images(11) / np.float32(255)).astype(np.float32)
    assert np.array_equal(box.query(queries), answers(queries))
    assert (box.asked, box.classes, box.image_shape, box.client) == (11, 3, SHAPE, "alice")
    assert sum(server.charged.values()) == 11 and len(server.asked) == 6 and server.most_at_once <= 3
    assert sorted(int(name.partition("-")[0]) for name in server.asked) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("closed"),
        httpx.ReadTimeout("late"),
        httpx.Response(500, text="Internal Server Error"),
        problem(503),
        problem(502),
        httpx.Response(404, text="Path '/v1/predict' not found."),
    ],
    ids=lambda failure: str(getattr(failure, "status_code", failure)),
)
def test_a_failure_is_repeated_under_the_same_id_and_charged_once(failure: Any) -> None:
    server = Server(failing(2, failure))
    assert np.array_equal(server.box().query(images(2)), answers(images(2)))
    assert len(server.asked) == 3 and len(set(server.asked)) == 1
    assert sum(server.charged.values()) == 2


def test_a_service_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(failing(-1, httpx.ConnectError("refused")))
    box = server.box(sleep=lambda seconds: __import__("time").sleep(min(seconds, 0.05)))
    with pytest.raises(ServiceUnavailable, match=r"does not answer: refused; tried \d+ times"):
        box.query(images(2))
    assert box.asked == 0


def test_late_answers_are_borne_as_often_as_set() -> None:
    server = Server(failing(-1, httpx.ReadTimeout("late")))
    with pytest.raises(ServiceUnavailable, match="tried 3 times"):
        server.box().query(images(2))
    assert len(server.asked) == 3


def test_retry_after_is_honoured() -> None:
    server = Server(failing(1, problem(429, retry_after_s=0.75)))
    server.box().query(images(1))
    assert server.slept == [0.75]
    server = Server(failing(1, httpx.Response(429, headers={"Retry-After": "3"})))
    server.box().query(images(1))
    assert server.slept == [3.0]


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (problem(400), BadQuery),
        (problem(401), UnknownClient),
        (problem(403), UnknownClient),
        (problem(402, asked=2, remaining=1, budget=9), OverBudget),
        (problem(409), RequestConflict),
        (problem(413), BadQuery),
        (problem(415), BadQuery),
        (problem(422), BadQuery),
    ],
    ids=lambda value: str(getattr(value, "status_code", "")),
)
def test_codes_are_typed_errors_and_are_not_repeated(response: httpx.Response, error: type[Exception]) -> None:
    server = Server(failing(-1, response))
    box = server.box(settings=ClientConfig(request_images=2, max_in_flight=1))
    with pytest.raises(error) as caught:
        box.query(images(8))
    assert len(server.asked) == 1 and box.asked == 0 and server.slept == []
    if isinstance(caught.value, OverBudget):
        assert (caught.value.remaining, caught.value.budget) == (1, 9)


def test_a_query_that_does_not_fit_is_refused_whole() -> None:
    server = Server(budget=5)
    box = server.box()
    with pytest.raises(OverBudget):
        box.query(images(6))
    assert server.charged == {} and box.remaining == 5
    own = Server().box(budget=3)
    assert own.remaining == 3
    with pytest.raises(OverBudget):
        own.query(images(4))


def test_a_resumed_thief_pays_nothing_twice() -> None:
    server = Server(budget=8)
    server.box().query(images(8))
    again = server.box(start_at=4)
    assert np.array_equal(again.query(images(8)[4:]), answers(images(8)[4:]))
    assert sum(server.charged.values()) == 8


def test_a_box_travels_to_another_process() -> None:
    wire = ForeignWire(build(ForeignApi, {"image_shape": list(SHAPE), "classes": ["a", "b"], "scores": "s"}))
    settings = ClientConfig(request_images=1)
    there = pickle.loads(pickle.dumps(HttpBlackBox("http://test", "key", settings, start_at=7, wire=wire)))
    assert (there.asked, there.classes, there.image_shape) == (7, 2, SHAPE)


def test_answers_that_make_no_sense_are_refused() -> None:
    for content in (b"", b"nonsense", np.zeros(3).tobytes()):
        server = Server(failing(-1, httpx.Response(200, content=content)))
        with pytest.raises(ServiceUnavailable, match="gave an unreadable answer"):
            server.box().query(images(1))
    stream = io.BytesIO()
    np.save(stream, np.zeros((1, 7), np.float32))
    with pytest.raises(ServiceUnavailable, match=r"expected \[1, 3\]"):
        Server(failing(-1, httpx.Response(200, content=stream.getvalue()))).box().query(images(1))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://x", "not an http or https URL"),
        ("flowers", "not an http or https URL"),
        ("http://a:b@c", "contains a password"),
        ("http://x:99999999", "not a URL"),
    ],
)
def test_a_bad_url_is_named(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        HttpBlackBox(url)


def test_another_service_at_the_url_is_reported() -> None:
    for reply in (httpx.Response(404), httpx.Response(200, text="<html>"), httpx.Response(200, json={})):
        with pytest.raises(ConfigError, match="is not a service of `mea-ray serve`"):
            HttpBlackBox("http://test", transport=httpx.MockTransport(lambda request, reply=reply: reply))


def test_requests_larger_than_the_service_takes_are_refused_before_any_is_sent() -> None:
    with pytest.raises(ConfigError, match="request_images=6 is more than the 5"):
        Server().box(settings=ClientConfig(request_images=6))


COLOUR = (3, 4, 4)


def colours(n: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (n, *COLOUR), dtype=np.uint8)


def foreign(settings: dict[str, Any], handle: Callable[[httpx.Request], Any], n: int = 2) -> np.ndarray:
    api = build(ForeignApi, {"image_shape": list(COLOUR), "classes": ["cat", "dog", "fox"], **settings})
    client = ClientConfig(request_images=api.max_request_images)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=handle(request)))
    return HttpBlackBox("http://test/api", "k", client, wire=ForeignWire(api, "k"), transport=transport).query(
        colours(n)
    )


def test_a_foreign_api_with_pictures_and_top_k() -> None:
    seen: list[np.ndarray] = []

    def handle(request: httpx.Request) -> Any:
        assert request.url.path == "/api/predict" and request.headers["x-api-key"] == "k"
        body = json.loads(request.content)
        assert body["top"] == 2
        seen.extend(np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in body["instances"])
        row = {"labels": [{"name": "dog", "confidence": 0.7}, {"name": "cat", "confidence": 0.2}]}
        return {"predictions": [row] * len(body["instances"])}

    result = foreign(
        {
            "path": "/predict",
            "headers": {"X-Api-Key": "{key}"},
            "body": {"instances": IMAGES, "top": 2},
            "rows": "predictions",
            "top": {"items": "labels", "label": "name", "score": "confidence"},
            "max_request_images": 8,
        },
        handle,
    )
    assert np.allclose(result, [[0.2, 0.7, 0]] * 2)
    assert np.array_equal(np.stack(seen).transpose(0, 3, 1, 2), colours(2)), "a PNG changes no pixel"


def test_a_foreign_api_with_lists_and_logits_by_name() -> None:
    def handle(request: httpx.Request) -> Any:
        pixels = np.array(json.loads(request.content)["pixels"])
        assert pixels.shape == (4, 4, 3) and pixels.min() >= 0 and pixels.max() <= 1
        return {"output": {"logits": {"dog": 1.0, "cat": 0.0, "fox": -1.0}}}

    result = foreign(
        {
            "encoding": "lists",
            "layout": "hwc",
            "white": 1,
            "body": {"pixels": IMAGE},
            "rows": "output",
            "scores": "logits",
            "logits": True,
        },
        handle,
    )
    powers = np.exp([0.0, 1.0, -1.0])
    assert np.allclose(result, [powers / powers.sum()] * 2)


def test_a_foreign_api_with_a_bare_picture_and_a_label() -> None:
    def handle(request: httpx.Request) -> Any:
        assert request.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(request.content)).size == (4, 4)
        return {"result": ["fox"]}

    result = foreign({"encoding": "jpeg", "label": "result.0"}, handle)
    assert np.array_equal(result, [[0, 0, 1]] * 2)


def test_a_foreign_api_with_odd_names_and_per_cent() -> None:
    def handle(request: httpx.Request) -> Any:
        return {"model.v2": {"out-put": [{"scores in %": [20, "70", 10.0]}]}}

    found = foreign({"rows": r"model\.v2.out-put", "scores": "scores in %", "scale": 100}, handle)
    assert np.allclose(found, [[0.2, 0.7, 0.1]] * 2)


def test_a_class_is_sought_by_its_name_before_its_number() -> None:
    found = foreign({"classes": ["1", "2", "3"], "label": "class"}, lambda request: {"class": 1})
    assert np.array_equal(found, [[1, 0, 0]] * 2), "an API that calls its classes 1 to 3 and answers numbers"
    found = foreign({"label": "class"}, lambda request: {"class": 1})
    assert np.array_equal(found, [[0, 1, 0]] * 2)
    with pytest.raises(ServiceUnavailable, match="names a class 'True' that"):
        foreign({"label": "class"}, lambda request: {"class": True})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"rows": "predictions", "label": "x"},
            "no 'predictions' of 'predictions' in the answer, which has members out",
        ),
        ({"rows": "out", "label": "3.x"}, "no '3' of '3.x' in the answer, which has a list of 1"),
        ({"rows": "out", "top": {"items": "0.top"}}, "no 'score' of 'score' in the answer, which has members name, p"),
    ],
)
def test_a_path_that_leads_nowhere_is_named_with_what_there_is(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ServiceUnavailable, match=says):
        foreign(settings, lambda request: {"out": [[{"top": [{"name": "cat", "p": 1}]}]]})


def test_a_foreign_answer_of_an_unknown_class_is_named() -> None:
    with pytest.raises(ServiceUnavailable, match="names a class 'cow' that `classes` does not list"):
        foreign({"label": "result"}, lambda request: {"result": "cow"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "set exactly one of scores, label and top"),
        ({"scores": "a", "label": "b"}, "set exactly one of"),
        ({"label": "a", "encoding": "png", "max_request_images": 3}, "holds one image"),
        ({"label": "a", "image_shape": [2, 4, 4]}, "1 or 3 channels"),
        ({"label": "a", "colour": "x"}, "colour"),
    ],
)
def test_a_description_that_cannot_work_is_refused(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    tree = {"image_shape": list(COLOUR), "classes": ["cat", "dog", "fox"], **settings}
    (tmp_path / "api.yaml").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=says):
        load_api(tmp_path / "api.yaml")
