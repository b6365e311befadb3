"""Commitments, stamped by a real authority of RFC 3161 that OpenSSL runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from mea_ray.cli.main import main
from mea_ray.cli.options import OK, USAGE
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.experiment import artifacts
from mea_ray.experiment.commitment import add_reply, commit, committed
from mea_ray.models.build import build_model
from mea_ray.training.checkpoint import save_model
from mea_ray.verification.commitments import Commitment
from mea_ray.verification.timestamps import make_request
from mea_ray.watermarks.base import Key

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")

CONFIG = """
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
[tsa_cert]
keyUsage = critical, digitalSignature
extendedKeyUsage = critical, timeStamping
[tsa]
default_tsa = authority
[authority]
serial = serial
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha512
ess_cert_id_alg = sha256
"""


@dataclass(frozen=True)
class Authority:
    """A time-stamp authority with a root certificate of its own."""

    folder: Path

    @property
    def root(self) -> bytes:
        return (self.folder / "ca.pem").read_bytes()

    def stamp(self, request: bytes) -> bytes:
        (self.folder / "request.tsq").write_bytes(request)
        signer = ("-inkey", "tsa.key", "-signer", "tsa.pem")
        self.openssl("ts", "-reply", "-config", "tsa.cnf", "-queryfile", "request.tsq", *signer, "-out", "reply.tsr")
        return (self.folder / "reply.tsr").read_bytes()

    def openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


def authority(folder: Path) -> Authority:
    folder.mkdir()
    (folder / "tsa.cnf").write_text(CONFIG)
    (folder / "serial").write_text("01")
    made = Authority(folder)
    key = ("-newkey", "rsa:2048", "-nodes")
    made.openssl("req", *key, "-keyout", "ca.key", "-subj", "/CN=Test root", "-out", "ca.csr")
    sign = ("-days", "2", "-extfile", "tsa.cnf")
    made.openssl("x509", "-req", "-in", "ca.csr", "-signkey", "ca.key", "-extensions", "ca", *sign, "-out", "ca.pem")
    made.openssl("req", *key, "-keyout", "tsa.key", "-subj", "/CN=Test authority", "-out", "tsa.csr")
    by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "2", "-extensions", "tsa_cert")
    made.openssl("x509", "-req", "-in", "tsa.csr", *by, *sign, "-out", "tsa.pem")
    return made


@pytest.fixture(scope="module")
def tsa(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("tsa") / "authority")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """An artifact of a victim that was never trained."""
    return artifact(tmp_path / "victim", target=2)


def artifact(folder: Path, target: int) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    save_model(folder, build_model("vgg_like", (1, 8, 8), 10, {"width": 0.0625}), {})
    draw = {"classes": "system", "admissible": {"classes": 10, "ordered": True, "geometries": []}}
    Key("composite", (0, 1), target, 7, {"combiner": "crop_paste"}, draw=draw).save(folder)
    artifacts._write_info(folder, {"name": folder.name})
    return folder


def test_a_commitment_hides_and_binds_what_it_is_to() -> None:
    key, model = "1" * 64, "2" * 64
    first, second = (Commitment.to(key, model, {"classes": "system"}) for _ in range(2))
    assert first.digest != second.digest, "the nonce is new, so that nobody can try keys"
    expected = {"schema_version": 1, "key": key, "model": model, "admissible": {"classes": "system"}}
    text = json.dumps({**expected, "nonce": first.nonce}, sort_keys=True, separators=(",", ":"))
    assert first.digest == hashlib.sha256(text.encode()).hexdigest()
    changes: list[dict[str, Any]] = [{name: "3" * 64} for name in ("key", "model", "nonce")]
    assert all(first.model_copy(update=change).digest != first.digest for change in [*changes, {"admissible": {}}])


def test_request_reply_and_check(victim: Path, tsa: Authority) -> None:
    made, folder = commit(victim)
    assert committed(victim) is not None and committed(victim).time is None  # type: ignore[union-attr]
    request = (folder / "request.tsq").read_bytes()
    assert bytes.fromhex(made.digest) in request, "the hash, and nothing else of the key, is sent"
    assert commit(victim)[0] == made, "a commitment is made once"

    begun = datetime.now(timezone.utc) - timedelta(seconds=2)
    stamped = add_reply(victim, tsa.stamp(request), tsa.root)
    assert stamped.time is not None and begun < stamped.time < datetime.now(timezone.utc) + timedelta(seconds=2)
    assert stamped.authority == "CN=Test authority" and stamped.digest == made.digest
    assert committed(victim) == stamped == committed(victim, tsa.root)
    assert stamped.before(stamped.time + timedelta(seconds=1)) and not stamped.before(stamped.time)
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((victim / "key.json").stat().st_mode) == 0o600

    # OpenSSL itself agrees.
    reply = folder / "reply.tsr"
    tsa.openssl("ts", "-verify", "-digest", made.digest, "-in", str(reply), "-CAfile", "ca.pem")


def test_a_changed_key_is_refused(victim: Path, tsa: Authority, tmp_path: Path) -> None:
    _, folder = commit(victim)
    add_reply(victim, tsa.stamp((folder / "request.tsq").read_bytes()), tsa.root)
    other = artifact(tmp_path / "other", target=3)
    shutil.copytree(folder, other / "commitment")
    with pytest.raises(ArtifactError, match="the key changed"):
        committed(other)
    with pytest.raises(ArtifactError, match="the key changed"):
        commit(other)
    # A commitment that is edited to fit the key is not what was stamped.
    path = other / "commitment" / "commitment.json"
    edited = json.loads(path.read_text())
    edited["key"] = Key.load(other).digest()
    path.write_text(json.dumps(edited))
    with pytest.raises(ArtifactError, match="does not hold"):
        committed(other)


def test_a_reply_for_another_digest_is_refused(victim: Path, tsa: Authority) -> None:
    commit(victim)
    for content in (b"something else", Commitment.to("1" * 64, "2" * 64, {}).content):
        with pytest.raises(ArtifactError, match="does not hold"):
            add_reply(victim, tsa.stamp(make_request(content)), tsa.root)
    assert committed(victim).time is None, "a reply that was refused is not kept"  # type: ignore[union-attr]


def test_an_authority_that_is_not_trusted_is_refused(victim: Path, tsa: Authority, tmp_path: Path) -> None:
    _, folder = commit(victim)
    reply = tsa.stamp((folder / "request.tsq").read_bytes())
    with pytest.raises(ArtifactError, match="does not hold"):
        add_reply(victim, reply, authority(tmp_path / "stranger").root)
    with pytest.raises(ArtifactError, match="does not hold"):
        add_reply(victim, reply)  # this system does not know the test's root
    damaged = bytearray(reply)
    damaged[-20] ^= 1
    for bad in (bytes(damaged), b"", b"<html>", reply[:100]):
        with pytest.raises(ArtifactError):
            add_reply(victim, bad, tsa.root)
    with pytest.raises(ConfigError, match="PEM"):
        add_reply(victim, reply, b"no certificate")


def test_changed_weights_are_refused(victim: Path) -> None:
    commit(victim)
    torch.manual_seed(1)
    save_model(victim, build_model("vgg_like", (1, 8, 8), 10, {"width": 0.0625}), {})
    (victim / "info.json").unlink()
    artifacts._write_info(victim, {"name": victim.name})
    with pytest.raises(ArtifactError, match="the weights changed"):
        committed(victim)


@pytest.fixture
def url(tsa: Authority) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/timestamp-query"
            reply = tsa.stamp(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_command_asks_an_authority(
    victim: Path, tsa: Authority, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tsa.folder / "ca.pem")
    assert main(["commit", str(victim)]) == OK
    assert "There is no time stamp yet" in capsys.readouterr().out
    assert main(["commit", str(victim), "--tsa", url, "--roots", root]) == OK
    assert "UTC by CN=Test authority" in capsys.readouterr().out
    assert main(["commit", str(victim)]) == OK, "the root is kept beside the reply"
    assert "UTC by CN=Test authority" in capsys.readouterr().out
    assert main(["commit", str(victim), "--tsa", "http://127.0.0.1:1"]) == USAGE
    assert "did not answer" in capsys.readouterr().err
    assert main(["commit", str(victim), "--tsa", "ftp://a", "--reply", "b"]) == USAGE
    assert main(["commit", str(victim.parent)]) == USAGE
    assert "mea-ray train" in capsys.readouterr().err
