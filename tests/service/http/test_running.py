"""Where a service listens: a port or a certificate that cannot be used is refused before Ray is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from certificate import self_signed

from mea_ray.core.errors import ConfigError
from mea_ray.service.http.running import Address


def test_a_port_that_another_service_shares_is_refused() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray Serve's proxy listens
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be used: another program listens"):
            Address(port=port).claimed()
    assert Address(port=port).claimed() == Address(port=port), "once it is closed"


def test_port_0_is_a_free_one() -> None:
    claimed = Address(port=0).claimed()
    assert claimed.port > 0 and claimed.url == f"http://127.0.0.1:{claimed.port}"


@pytest.mark.parametrize(
    ("host", "says"), [("192.0.2.1", "no interface of this machine"), ("no.such.host.invalid", "cannot be used")]
)
def test_a_host_that_is_not_this_machine_is_refused(host: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Address(host).claimed()


def test_a_certificate_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other", "locked")]
    for folder in folders:
        folder.mkdir()
    (one, key), (other, _) = self_signed(folders[0]), self_signed(folders[1])
    locked, private = self_signed(folders[2], password=b"secret")
    Address(tls_cert=one, tls_key=key).check()
    (noise := tmp_path / "noise.pem").write_bytes(bytes(range(256)))
    for certificate, secret, says in [
        (other, key, "key values mismatch"),
        (noise, key, "noise.pem and .*key.pem are not a certificate chain"),
        (one, one, "are not a certificate chain with its private key"),
        (locked, private, "the key without a password"),
        (tmp_path, key, "is not a file; give the certificate chain"),
        (one, tmp_path / "lost.pem", r"lost\.pem is not a file; give the certificate chain"),
    ]:
        with pytest.raises(ConfigError, match=says):
            Address(tls_cert=certificate, tls_key=secret).check()
