"""A victim behind HTTP from Python: TLS, keys, usage, another victim, more replicas under load."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
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


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for 127.0.0.1 and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), True)
        .sign(key, hashes.SHA256())
    )
    pem, private = folder / "cert.pem", folder / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, private


def test_mistakes_are_named_before_anything_starts(tmp_path: Path) -> None:
    victim = save_victim(tmp_path / "flowers")
    with pytest.raises(ArtifactError, match="there is no folder"):
        mea_ray.serve(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="polcy"):
        mea_ray.serve(victim, {"polcy": "top_k"})
    with pytest.raises(ConfigError, match=r"cert\.pem is no file"):
        mea_ray.serve(victim, tls=(tmp_path / "cert.pem", tmp_path / "key.pem"))


@pytest.mark.slow
def test_a_service_over_tls_is_asked_updated_and_ended(
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
def test_more_replicas_are_started_under_load(ray_session: None, tmp_path: Path) -> None:
    from ray import serve

    settings = {"max_replicas": 2, "ongoing_requests": 1, "cpus_per_replica": 0.25}
    with mea_ray.serve(save_victim(tmp_path / "flowers"), settings, port=free_port()) as served:

        def replicas() -> int:
            (app,) = serve.status().applications.values()
            states = app.deployments["victim"].replica_states
            return sum(count for state, count in states.items() if state == "RUNNING")

        over = threading.Event()
        keys = [served.add_client(f"client-{index}") for index in range(6)]

        def ask(key: str) -> None:
            box = HttpBlackBox(served.url, key)
            while not over.is_set():
                box.query(images(32))

        threads = [threading.Thread(target=ask, args=(key,)) for key in keys]
        for thread in threads:
            thread.start()
        try:
            deadline = time.monotonic() + 180
            while replicas() < 2 and time.monotonic() < deadline:
                time.sleep(1)
            assert replicas() == 2
        finally:
            over.set()
            for thread in threads:
                thread.join()
        usage = served.usage()
        assert len(usage) == 6 and all(row["charged"] == row["log"]["images"] for row in usage)
    serve.shutdown()
