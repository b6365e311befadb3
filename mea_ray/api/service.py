"""The owner's service from Python: a victim behind HTTP."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mea_ray.config import build
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.victim import Victim
from mea_ray.service.http.keys import KeyStore, service_name, state_folder
from mea_ray.service.http.settings import HttpConfig

if TYPE_CHECKING:
    from mea_ray.service.http.proxies import Proxy
    from mea_ray.service.http.running import RunningService


class Served:
    """A victim's HTTP service, running until ``stop`` or the end of a ``with`` block.

    Attributes:
        url: URL for clients.
        owner_url: URL of the owner's page, reachable from this machine only.
        folder: Folder of keys, ledger and query log.
    """

    def __init__(self, service: RunningService, owner_url: str, until: ExitStack) -> None:
        self._service, self._until = service, until
        self.url, self.owner_url, self.folder = service.address.url, owner_url, service.spec.state

    def add_client(
        self, name: str, *, budget: int | None = None, images_per_second: float | None = None, burst: int = 1000
    ) -> str:
        """Add a client and return its API key, of which only the hash is stored.

        Args:
            name: Name of the client.
            budget: Query budget in images; None for no limit.
            images_per_second: Sustained rate; None for no limit.
            burst: Images that it can send at once after a pause.

        Raises:
            ConfigError: The name is invalid or in use, or a limit is out of range.
        """
        store = KeyStore(self.folder)
        return store.add(name, budget=budget, images_per_second=images_per_second, burst=burst)

    def usage(self) -> list[dict[str, Any]]:
        """Return, for each client, ``client``, ``charged``, ``budget``, ``remaining`` and its ``log``."""
        return self._service.usage()

    def update(self, victim: Victim | str | Path) -> None:
        """Serve another victim under the same keys; requests in flight are answered by the old one.

        Raises:
            ArtifactError: The folder holds no readable victim.
            ServiceUnavailable: The new victim could not be started; the old one stays in service.
        """
        self._service.update(_folder_of(victim))

    def stop(self) -> None:
        """Answer the requests in flight, then stop the service. Ctrl-C does not interrupt this."""
        with _uninterrupted():
            self._until.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve(
    victim: Victim | str | Path,
    settings: HttpConfig | Mapping[str, Any] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tls: tuple[str | Path, str | Path] | None = None,
    owner_port: int = 0,
    state: str | Path | None = None,
    address: str | None = None,
    proxy: Proxy = "ray",
) -> Served:
    """Serve a victim over HTTP on Ray Serve, and return once it answers.

    Args:
        victim: A saved victim, or its folder.
        settings: Replicas, policy, limits, e.g. ``{"replicas": 2, "policy": "label_only"}``.
        host: Interface to listen on.
        port: TCP port; 0 chooses a free one.
        tls: Files of the certificate chain and of its private key, PEM; None for plain HTTP.
        owner_port: TCP port of the owner's page, on this machine only; 0 chooses one.
        state: Folder of keys, ledger and query log; beside the victim's folder when None.
        address: Ray cluster, ``host:port`` or ``auto``; None starts one on this machine.
        proxy: HTTP proxy in front of the replicas, if Ray is started here: Ray Serve's own (``ray``), the faster
            ``haproxy``, or HAProxy where it is available (``auto``).

    Raises:
        ArtifactError: The folder holds no readable victim.
        ConfigError: A setting is wrong, the victim was not saved, the service runs already, or the port is taken.
        ServiceUnavailable: It could not be started.
    """
    import ray

    from mea_ray.service.http import admin, proxies
    from mea_ray.service.http.deployment import Spec
    from mea_ray.service.http.engine import about_victim
    from mea_ray.service.http.running import Address, RunningService, announced, find_running
    from mea_ray.sweep import cluster
    from mea_ray.sweep.modules import modules_to_send

    folder = _folder_of(victim)
    if not isinstance(settings, HttpConfig):
        settings = build(HttpConfig, dict(settings or {}))
    place = Path(state) if state is not None else state_folder(folder)
    about_victim(folder)
    certificate, secret = (None, None) if tls is None else (Path(tls[0]), Path(tls[1]))
    listening = Address(host, port, certificate, secret)
    listening.check()
    if (other := find_running(place)) is not None:
        raise ConfigError(
            f"{place} is served by {other} at {other.url}; stop it with Ctrl-C, or give it another "
            f"victim with: mea-ray serve {folder} --state {place} --update"
        )
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    spec = Spec(folder.resolve(), place.resolve(), service_name(place), settings)
    with ExitStack() as stack:
        stack.enter_context(cluster.quiet())
        address = cluster.check_address(address)
        own_ray = address is None and not ray.is_initialized()
        if own_ray or port == 0:
            listening = listening.claimed()
        kind = proxies.chosen(proxy, own_ray=own_ray, tls=tls is not None)
        stack.enter_context(cluster.environment(stack.enter_context(proxies.environment(kind))))
        stack.enter_context(cluster.ray_cluster(address, modules_to_send(_network(folder), None, address)))
        service = RunningService(spec, listening)
        stack.callback(service.stop)
        service.start()
        view = admin.create_admin(service)
        owner_url = stack.enter_context(admin.served(view, owner_port))
        view.state.running = stack.enter_context(announced(service, owner_url))
        return Served(service, owner_url, stack.pop_all())


def _folder_of(victim: Victim | str | Path) -> Path:
    return victim.require_folder() if isinstance(victim, Victim) else Path(victim)


def _network(folder: Path) -> Mapping[str, Any]:
    """Return the network named in a victim's folder, which can be a class from outside the package."""
    tree: dict[str, Any] = json.loads((folder / "model.json").read_bytes())
    return tree


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C until the block ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
