"""``mea-ray serve``, ``mea-ray keys`` and ``mea-ray usage``: a victim behind HTTP, for its owner."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mea_ray.core.errors import ArtifactError, ConfigError, ServiceUnavailable

_WEIGHTS = "model.safetensors"  # as in ``training.checkpoint``, which imports torch

if TYPE_CHECKING:
    from rich.table import Table

    from mea_ray.service.http.proxies import Proxy
    from mea_ray.service.http.settings import HttpConfig


def add(victim: Path, name: str, state: Path | None, **limits: Any) -> None:
    """Make a key and print it."""
    key = _store(victim, state).add(name, **limits)
    typer.echo(key)
    typer.echo(f"the key of {name}; it is shown only once", err=True)


def list_keys(victim: Path, state: Path | None) -> None:
    """List the clients with their limits."""
    from mea_ray.report.terminal import make_console

    records = _store(victim, state).list()
    if not records:
        typer.echo(f"no keys yet; add one with: mea-ray keys add {victim} NAME")
        return
    table = _table("client", "budget", "images/s", "burst", "created", "revoked")
    for each in records:
        rate = "none" if each.images_per_second is None else f"{each.images_per_second:g}"
        budget = "none" if each.budget is None else f"{each.budget:,}"
        burst = "" if each.images_per_second is None else f"{each.burst:,}"
        table.add_row(each.client, budget, rate, burst, each.created, each.revoked or "")
    make_console().print(table)


def revoke(victim: Path, name: str, state: Path | None) -> None:
    """Revoke a client's key."""
    _store(victim, state).revoke(name)
    typer.echo(f"{name} is rejected from now on; its charges stay in the ledger")


def limit(victim: Path, name: str, budget: str | None, rate: str | None, burst: int | None, state: Path | None) -> None:
    """Change a client's limits; "none" removes one.

    Raises:
        ConfigError: There is nothing to change, or a limit is not a number.
    """
    changes: dict[str, Any] = {}
    if budget is not None:
        changes["budget"] = None if budget == "none" else _number("--budget", budget, int)
    if rate is not None:
        changes["images_per_second"] = None if rate == "none" else _number("--rate", rate, float)
    if burst is not None:
        changes["burst"] = burst
    if not changes:
        raise ConfigError("nothing to change; give --budget, --rate or --burst")
    record = _store(victim, state).limit(name, **changes)
    budget_text = "none" if record.budget is None else f"{record.budget:,}"
    rate_text = "none" if record.images_per_second is None else f"{record.images_per_second:g} images/s"
    typer.echo(f"{name}: budget {budget_text}, rate {rate_text}")


def usage(victim: Path, state: Path | None, as_json: bool) -> None:
    """Show what each client was charged and what its queries look like; see ``mea_ray.cli.main``."""
    from mea_ray.report.terminal import make_console

    view = _usage(victim, _state(victim, state))
    if as_json:
        typer.echo(json.dumps(view, indent=1))
        return
    names = _class_names(victim)
    table = _table("client", "charged", "budget", "left", "requests", "commonest classes", "PRADA's W", "outliers")
    for each in view:
        log = each["log"]
        order = sorted(range(len(log["classes"])), key=lambda k: -log["classes"][k])[:3]
        common = ", ".join(f"{names.get(k, k)}: {log['classes'][k]}" for k in order if log["classes"][k])
        w = "too few" if log["shapiro_w"] is None else f"{log['shapiro_w']:.3f}"
        cell = f"[red]{w} alarm[/]" if log["alarm"] else w
        numbers = ["none" if value is None else f"{value:,}" for value in (each["budget"], each["remaining"])]
        table.add_row(
            each["client"], f"{each['charged']:,}", *numbers, f"{log['requests']:,}", common, cell, str(log["flagged"])
        )
    console = make_console()
    console.print(table)
    if view:
        console.print(
            "PRADA's W: normality of the distances between a client's images, near 1 for a customer; alarm below "
            f"{view[0]['log']['alarm_below']:g}",
            soft_wrap=True,
        )


def serve(
    victim: Path,
    overrides: Sequence[str],
    host: str,
    port: int,
    tls: tuple[Path, Path] | None,
    admin_port: int,
    state: Path | None,
    ray_address: str | None,
    proxy: Proxy = "ray",
) -> None:
    """Serve a victim until Ctrl-C; see ``mea_ray.cli.main``.

    Raises:
        ArtifactError: The folder holds no readable victim.
        ConfigError: A setting is wrong, or the service runs already.
        ServiceUnavailable: It could not be started.
    """
    from mea_ray import api
    from mea_ray.report.terminal import make_console

    console = make_console(stderr=True)
    starting = console.status("starting the service")
    starting.start()
    try:
        served = api.serve(
            victim,
            _settings(overrides),
            host=host,
            port=port,
            tls=tls,
            owner_port=admin_port,
            state=state,
            address=ray_address,
            proxy=proxy,
        )
    finally:
        starting.stop()
    with served:
        console.print(f"service  {served.url}  (its description: {served.url}/docs)", soft_wrap=True)
        console.print(f"owner    {served.owner_url}", soft_wrap=True)
        _print_keys(console, victim, served.folder)
        console.print("Ctrl-C ends it; requests in flight are answered first.")
        _until_interrupted()  # `cli.interrupts` prints a line for it


def update(victim: Path, state: Path | None) -> None:
    """Give a running service another victim; see ``mea_ray.cli.main``.

    Raises:
        ConfigError: The service does not run on this machine, or the victim cannot be served.
        ServiceUnavailable: The new victim could not be started.
    """
    import httpx

    from mea_ray.service.http.running import find_running

    folder = _state(victim, state)
    running = find_running(folder)
    if running is None:
        raise ConfigError(f"no service of {folder} runs on this machine; start one with `mea-ray serve`")
    try:
        answer = httpx.post(
            f"{running.admin}/update",
            json={"victim": str(victim.resolve())},
            headers={"X-Token": running.token},
            timeout=600,
        )
    except httpx.HTTPError as error:
        raise ServiceUnavailable(f"{running} does not answer ({error}); start the service again") from None
    if answer.status_code != 200:
        raise ConfigError(str(answer.json().get("detail", answer.text)))
    typer.echo(f"{running.url} answers with {victim}")


def tls_files(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """Return both TLS files, or None if neither is given.

    Raises:
        ConfigError: One is missing.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("TLS needs both files: --tls-cert and --tls-key")
    return certificate, key


def _until_interrupted() -> None:
    """Wait for Ctrl-C or SIGTERM, which `cluster.ray_cluster` turns into a KeyboardInterrupt."""
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def _print_keys(console: Any, victim: Path, folder: Path) -> None:
    from mea_ray.service.http.keys import KeyStore

    valid = [record.client for record in KeyStore(folder).list() if record.revoked is None]
    if valid:
        console.print(f"keys     {len(valid)}: {', '.join(valid[:10])}{', ...' if len(valid) > 10 else ''}")
    else:
        console.print(f"keys     none yet; add one with: mea-ray keys add {victim} NAME --budget 1000", soft_wrap=True)


def _settings(overrides: Sequence[str]) -> HttpConfig:
    from mea_ray.config import build
    from mea_ray.config.overrides import overridden, split_override
    from mea_ray.service.http.settings import HttpConfig

    tree, _ = overridden(HttpConfig, {}, list(map(split_override, overrides)))
    return build(HttpConfig, tree)


def _class_names(victim: Path) -> dict[int, str]:
    """Return the class names of a victim by class index; empty if its folder is missing."""
    from mea_ray.service.http.engine import about_victim

    try:
        return dict(enumerate(about_victim(victim).class_names))
    except ArtifactError:
        return {}


def _usage(victim: Path, state: Path) -> list[dict[str, Any]]:
    import httpx

    from mea_ray.service.http.engine import about_victim
    from mea_ray.service.http.running import find_running, offline_usage

    running = find_running(state)
    if running is None:
        return offline_usage(state, len(about_victim(victim).class_names))
    try:
        clients: list[dict[str, Any]] = httpx.get(f"{running.admin}/usage.json", timeout=120).json()["clients"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ServiceUnavailable(f"{running} does not answer ({error}); start the service again") from None
    return clients


def _state(victim: Path, state: Path | None) -> Path:
    from mea_ray.service.http.keys import state_folder

    return state if state is not None else state_folder(victim)


def _store(victim: Path, state: Path | None) -> Any:
    from mea_ray.service.http.keys import KeyStore

    if not (victim / _WEIGHTS).is_file():
        raise ConfigError(
            f"{victim} is not a victim's folder, it has no {_WEIGHTS}; give one that `mea-ray train` wrote, or "
            "STORAGE/artifacts/victims/NAME"
        )
    return KeyStore(_state(victim, state))


def _number(option: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{option} {text} is not a number; give a number, or none for no limit") from None


def _table(*headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right", overflow="fold")
    return table
