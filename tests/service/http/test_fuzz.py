"""Whatever is sent, the service answers by its description, never with a 500, and charges nothing for a refusal."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from http_service import InProcess, images, save_victim
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mea_ray.service.http import admin
from mea_ray.service.http.bodies import ACCEPTED

CASES = int(os.environ.get("MEA_RAY_FUZZ_CASES", "0"))
"""Cases of the long test; before a release: MEA_RAY_FUZZ_CASES=10000 pytest -m slow tests/service/http"""
QUIET = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[InProcess, str, str]]:
    """A service with one client: the service, its URL, the client's key."""
    folder = tmp_path_factory.mktemp("service")
    made = InProcess(save_victim(folder / "victim"), folder)
    key = made.keys.add("fuzzer")
    with admin.served(made.app, 0) as url:
        yield made, url, key


def charged(url: str, key: str) -> int:
    usage = httpx.get(f"{url}/v1/usage", headers={"Authorization": f"Bearer {key}"})
    return int(usage.json()["charged"])


def seeds() -> list[tuple[bytes, str]]:
    """Bodies that are accepted, one of each type."""
    array, picture = io.BytesIO(), {form: io.BytesIO() for form in ("PNG", "JPEG")}
    np.save(array, images(2))
    for form, stream in picture.items():
        Image.fromarray(images(1)[0, 0]).save(stream, form)
    return [
        (array.getvalue(), "application/x-npy"),
        (picture["PNG"].getvalue(), "image/png"),
        (picture["JPEG"].getvalue(), "image/jpeg"),
        (json.dumps({"images": images(1).tolist()}).encode(), "application/json"),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            + array.getvalue()
            + b"\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
        ),
    ]


def damaged(random: np.random.Generator, body: bytes) -> bytes:
    """Change, cut or repeat a part of a body."""
    data = bytearray(body)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(0, len(data) or 1))
        match int(random.integers(0, 4)):
            case 0:
                data[at : at + 1] = bytes([int(random.integers(0, 256))])
            case 1:
                del data[at : at + int(random.integers(1, 20))]
            case 2:
                data[at:at] = random.bytes(int(random.integers(1, 20)))
            case _:
                data[at:at] = data[: int(random.integers(0, 40))]
    return bytes(data)


def send_random_bodies(url: str, key: str, number: int) -> dict[int, int]:
    """Send bodies of noise and damaged ones; return how often each code came, after a check of every charge."""
    random = np.random.default_rng(number)
    valid, codes = seeds(), dict[int, int]()
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        before = charged(url, key)
        for turn in range(number):
            body, kind = valid[turn % len(valid)]
            if turn % 3 == 0:
                body, kind = random.bytes(int(random.integers(0, 300))), str(random.choice(ACCEPTED))
            response = client.post("/v1/predict", content=damaged(random, body), headers={"Content-Type": kind})
            codes[response.status_code] = codes.get(response.status_code, 0) + 1
            assert response.status_code < 500, (turn, response.text)
            if response.status_code == 200:
                before += len(response.json()["predictions"])
            else:
                assert response.json()["status"] == response.status_code
            if turn % 25 == 0 or turn == number - 1:
                assert charged(url, key) == before, turn
        assert client.get("/healthz").status_code == 200
    return codes


def test_random_bodies_cost_nothing_and_break_nothing(service: tuple[InProcess, str, str]) -> None:
    _, url, key = service
    codes = send_random_bodies(url, key, 150)
    assert set(codes) <= {200, 400, 413, 415, 422} and codes[400] > 20


@pytest.mark.slow
def test_two_thousand_random_bodies(service: tuple[InProcess, str, str]) -> None:
    _, url, key = service
    assert sum(send_random_bodies(url, key, 2000).values()) == 2000


def fuzz(service: tuple[InProcess, str, str], cases: int) -> int:
    """Send cases that the description suggests, valid and invalid, to each route; return how many were sent."""
    schemathesis = pytest.importorskip("schemathesis")
    _, url, key = service
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    sent = 0

    def expect(operation: object) -> None:
        strategies = [
            operation.as_strategy(generation_mode=mode)  # type: ignore[attr-defined]
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        ]

        @settings(QUIET, max_examples=cases)
        @given(case=st.one_of(strategies))
        def ask(case: object) -> None:
            nonlocal sent
            sent += 1
            response = case.call(headers={"Authorization": f"Bearer {key}"})  # type: ignore[attr-defined]
            assert response.status_code != 500, response.text
            case.validate_response(response, checks=checks(schemathesis))  # type: ignore[attr-defined]

        ask()

    for result in schema.get_all_operations():
        expect(result.ok())
    assert httpx.get(f"{url}/healthz").status_code == 200
    return sent


def checks(schemathesis: object) -> list[object]:
    """Return what every response must be: no server error, a documented code and type, and of the documented form."""
    from schemathesis.specs.openapi import checks as documented

    names = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
    return [schemathesis.checks.not_a_server_error, *(getattr(documented, name) for name in names)]  # type: ignore[attr-defined]


def test_the_description_holds_for_generated_requests(service: tuple[InProcess, str, str]) -> None:
    assert fuzz(service, 8) >= 30


@pytest.mark.slow
def test_many_generated_requests(service: tuple[InProcess, str, str]) -> None:
    cases = CASES or 1000
    assert fuzz(service, cases // 3) > 0
