"""A victim behind HTTP from Python: TLS, keys, usage, another victim, more replicas under load."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from certificate import self_signed
from http_service import SHAPE, images, save_victim

import mea_ray
from mea_ray.blackbox.http import HttpBlackBox
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.models.build import build_model
from mea_ray.training.checkpoint import load_model, save_model


def free_port() -> int:
    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        return int(result.getsockname()[1])


def test_mistakes_are_named_before_anything_starts(tmp_path: Path) -> None:
    victim = save_victim(tmp_path / "flowers")
    with pytest.raises(ArtifactError, match="there is no folder"):
        mea_ray.serve(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="polcy"):
        mea_ray.serve(victim, {"polcy": "top_k"})
    with pytest.raises(ConfigError, match=r"cert\.pem is not a file"):
        mea_ray.serve(victim, tls=(tmp_path / "cert.pem", tmp_path / "key.pem"))


@pytest.mark.slow
def test_a_service_over_tls_is_queried_updated_and_ended(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, other = save_victim(tmp_path / "flowers"), tmp_path / "other"
    save_model(other, build_model("vgg_like", SHAPE, 10, {"width": 0.5}), {})
    certificate, private = self_signed(tmp_path)
    with mea_ray.serve(victim, port=(port := free_port()), tls=(certificate, private)) as served:
        assert served.url == f"https://127.0.0.1:{port}"
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{served.url}/healthz")
        trusted = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{served.url}/healthz", verify=trusted).json() == {"status": "ok"}
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/healthz")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        box = HttpBlackBox(served.url, served.add_client("alice", budget=20))
        queries = images(3)
        assert np.array_equal(box.query(queries), LocalBlackBox(load_model(victim)[0]).query(queries))
        served.update(other)
        assert np.array_equal(box.query(queries), LocalBlackBox(load_model(other)[0]).query(queries))
        assert [(row["client"], row["charged"], row["remaining"]) for row in served.usage()] == [("alice", 6, 14)]
        assert httpx.get(f"{served.owner_url}/usage.json").json()["clients"][0]["charged"] == 6
        with pytest.raises(ConfigError, match="is served by process"):
            mea_ray.serve(victim)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.owner_url}/usage.json")
    from ray import serve

    serve.shutdown()


@pytest.mark.slow
def test_replicas_are_added_under_load_and_end_after_it(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    settings = {"max_replicas": 3, "ongoing_requests": 1, "cpus_per_replica": 0.25, "idle_s": 2}
    with mea_ray.serve(save_victim(tmp_path / "flowers"), settings, port=free_port()) as served:

        def replicas() -> int:
            (app,) = serve.status().applications.values()
            states = app.deployments["victim"].replica_states
            return sum(count for state, count in states.items() if state == "RUNNING")

        def wait_for(number: int) -> None:
            deadline = time.monotonic() + 300
            while replicas() != number and time.monotonic() < deadline:
                time.sleep(1)
            assert replicas() == number

        over, victim = threading.Event(), LocalBlackBox(load_model(tmp_path / "flowers")[0])
        asked, failures = dict.fromkeys(map("client-{}".format, range(6)), 0), list[BaseException]()
        keys = [served.add_client(f"client-{index}") for index in range(6)]

        def ask(index: int) -> None:
            queries = images(32, seed=index)
            try:
                box, right = HttpBlackBox(served.url, keys[index]), victim.query(queries)
                while not over.is_set():
                    assert np.array_equal(box.query(queries), right)
                    asked[f"client-{index}"] += 32
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        try:
            wait_for(3)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        wait_for(1)
        assert not failures, failures
        usage = {row["client"]: row for row in served.usage()}
        assert {client: row["charged"] for client, row in usage.items()} == asked, "whoever answered"
        assert {client: row["log"]["images"] for client, row in usage.items()} == asked
        late = HttpBlackBox(served.url, served.add_client("late"))
        assert np.array_equal(late.query(images(3)), victim.query(images(3)))
    serve.shutdown()
