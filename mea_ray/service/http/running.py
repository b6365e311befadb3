"""A service run by this process: started, updated and stopped without losing a request."""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError

from mea_ray.core.errors import ConfigError, ServiceUnavailable
from mea_ray.service.http.deployment import Spec, application, ledger_of
from mea_ray.service.http.engine import about_victim
from mea_ray.service.http.keys import KeyStore, service_secret
from mea_ray.service.naming import answer_of, cause_of
from mea_ray.storage.files import write_whole
from mea_ray.storage.process import describe, identity, runs_here

RUNNING = "running.json"
_LEDGER_S = 60.0
_WAY_S = 60.0
_NOT_FREE = {
    errno.EADDRINUSE: "another program listens on it",
    errno.EACCES: "ports below 1024 are the system administrator's",
    errno.EADDRNOTAVAIL: "no interface of this machine has this address",
}
"""Why a port cannot be used, by the system's error number."""


@dataclass(frozen=True)
class Address:
    """The address of a service.

    Attributes:
        host: Interface; the loopback interface by default.
        port: TCP port.
        tls_cert: File of the certificate chain; None for plain HTTP.
        tls_key: File of its private key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def url(self) -> str:
        """URL of the service for a client on this machine."""
        host = "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host  # noqa: S104
        return f"{'https' if self.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def check(self) -> None:
        """Reject an unusable certificate, before anything is started.

        Raises:
            ConfigError: A TLS file is missing, is not PEM, or needs a password, or the key belongs to another
                certificate.
        """
        if self.tls_cert is None or self.tls_key is None:
            return
        for file in (self.tls_cert, self.tls_key):
            if not file.is_file():
                raise ConfigError(f"{file} is not a file; give the certificate chain and its key in PEM")
        try:
            # An empty password, since OpenSSL would prompt for one.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key, password="")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"{self.tls_cert} and {self.tls_key} are not a certificate chain with its private key "
                f"({str(reason).lower().replace('_', ' ')}); give both in PEM, the key without a password"
            ) from None

    def claimed(self) -> Address:
        """Return the address with a port that is free on this machine: its own, or any for port 0.

        Two services of one user could share a port, and each would get some of the requests.

        Raises:
            ConfigError: The port is taken or not permitted, or the host is not an address of this machine.
        """
        try:
            family, kind, _, _, where = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                # connections of a closed service in TIME_WAIT do not matter
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                return replace(self, port=int(probe.getsockname()[1]))
        except OSError as error:
            reason = _NOT_FREE.get(error.errno or 0, str(error))
            raise ConfigError(
                f"port {self.port} of {self.host} cannot be used: {reason}; choose another with --port or --host"
            ) from None


class RunningService:
    """A service of this process, on the Ray to which it is connected.

    Args:
        spec: The service.
        address: Where it listens.
    """

    def __init__(self, spec: Spec, address: Address) -> None:
        self.spec, self.address = spec, address
        self._turn = threading.Lock()
        self._classes = 1

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ArtifactError: The folder holds no readable victim.
            ServiceUnavailable: Ray Serve could not start it.
        """
        self._classes = self._check(self.spec)
        options: dict[str, Any] = {"host": self.address.host, "port": self.address.port}
        if self.address.tls_cert is not None:
            options |= {"ssl_certfile": str(self.address.tls_cert), "ssl_keyfile": str(self.address.tls_key)}
        try:
            serve.start(proxy_location="HeadOnly", http_options=options, logging_config={"enable_access_log": False})
        except Exception as error:  # Serve raises errors of many types here
            raise ServiceUnavailable(
                f"Ray Serve cannot listen on {self.address.host}:{self.address.port}: {cause_of(error)}"
            ) from error
        self._deploy(self.spec)
        self._wait_for_the_way()

    def update(self, victim: Path) -> None:
        """Serve another victim under the same keys and ledger; requests in flight are answered by the old one.

        Raises:
            ArtifactError: The folder holds no readable victim.
            ServiceUnavailable: The new victim could not be started; the old one stays in service.
        """
        with self._turn:
            spec = replace(self.spec, victim=victim.resolve())
            self._classes = self._check(spec)
            self._deploy(spec)
            self.spec = spec

    def usage(self) -> list[dict[str, Any]]:
        """Return the owner's view of all clients, see `HttpLedger.usage`."""
        rows: list[dict[str, Any]] = answer_of(
            "the ledger", ledger_of(self.spec).usage.remote(service_secret(self.spec.state), self._classes), _LEDGER_S
        )
        return rows

    def stop(self) -> None:
        """Answer the requests in flight, then stop replicas and ledger."""
        with contextlib.suppress(Exception):  # Ray may have ended already
            serve.delete(self.spec.name, _blocking=True)
        with contextlib.suppress(Exception):
            ledger = ledger_of(self.spec)
            ray.get(ledger.close.remote(), timeout=_LEDGER_S)
            ray.kill(ledger, no_restart=True)

    def _wait_for_the_way(self) -> None:
        """Wait until requests reach a replica: HAProxy knows of one a moment after Ray Serve reports it as running."""
        end, last = time.monotonic() + _WAY_S, ""
        while time.monotonic() < end:
            try:
                # The certificate is the owner's own, and can be for a host other than the loopback one.
                answer = httpx.get(f"{self.address.url}/healthz", timeout=5, verify=False, trust_env=False)  # noqa: S501
                if answer.status_code == 200:
                    return
                last = f"it answers {answer.status_code}"
            except httpx.HTTPError as error:
                last = str(error) or type(error).__name__
            time.sleep(0.05)
        raise ServiceUnavailable(f"the service did not start within {_WAY_S:g} s: {self.address.url}: {last}")

    @staticmethod
    def _check(spec: Spec) -> int:
        """Reject a victim that cannot be served before a running service is changed; return the number of classes."""
        about = about_victim(spec.victim)
        policy = spec.settings.policy.build()
        return len(about.class_names) if policy.source == "probabilities" else 1

    def _deploy(self, spec: Spec) -> None:
        try:
            answer_of("the ledger", ledger_of(spec).describe.remote(), _LEDGER_S)
            serve.run(application(spec), name=spec.name, route_prefix="/")
        except (RuntimeError, RayError, TimeoutError) as error:
            raise ServiceUnavailable(f"the service did not start: {cause_of(error)}") from error


@dataclass(frozen=True)
class Running:
    """The record in a service's folder while it runs.

    Attributes:
        process: The process of ``mea-ray serve``, see ``storage.process.identity``.
        url: URL for clients.
        admin: URL of the owner's page.
        token: Secret with which the owner's commands change the service.
        victim: Folder of the victim.
    """

    process: dict[str, Any]
    url: str
    admin: str
    token: str
    victim: str

    def __str__(self) -> str:
        return describe(self.process)


@contextlib.contextmanager
def announced(service: RunningService, admin: str) -> Iterator[Running]:
    """Record in a service's folder that it runs, readable only by its owner, until the block ends."""
    path = service.spec.state / RUNNING
    running = Running(identity(), service.address.url, admin, secrets.token_hex(32), str(service.spec.victim))
    write_whole(path, json.dumps(asdict(running), indent=1), mode=0o600)
    try:
        yield running
    finally:
        path.unlink(missing_ok=True)


def find_running(state: Path) -> Running | None:
    """Return the running service of a folder; None if none runs on this machine."""
    try:
        running = Running(**json.loads((state / RUNNING).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return running if runs_here(running.process) else None


def offline_usage(state: Path, classes: int) -> list[dict[str, Any]]:
    """Return the owner's view of a service that is not running, from its files.

    Raises:
        ConfigError: The service was never started.
        ArtifactError: A running service on another machine holds the ledger, or it is damaged.
    """
    from mea_ray.service.http.deployment import LEDGER
    from mea_ray.service.http.ledger import HttpLedger

    if not (state / LEDGER).exists():
        known = len(KeyStore(state).list())
        keys = f"{known} key{'' if known == 1 else 's'}"
        raise ConfigError(f"no client has queried {state} yet ({keys}); start the service with `mea-ray serve`")
    secret = service_secret(state)
    ledger = HttpLedger(str(state / LEDGER), None, {}, secret)
    try:
        return ledger.usage(secret, classes)
    finally:
        ledger.close()
