"""``mea-ray steal``: only the thief's side, against a URL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mea_ray.cli.commands import read_base
from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.report.terminal import make_console
from mea_ray.storage.remote import Storage


def steal(
    file: Path, overrides: Sequence[str], url: str | None, key: str | None, api: Path | None, to: Path | None
) -> None:
    """Steal the model behind a URL and show the substitutes.

    Raises:
        ConfigError: There is no URL, or the settings do not fit the service.
        ServiceUnavailable: The service does not answer; the same command continues later.
    """
    from mea_ray.experiment.steal import StolenRung
    from mea_ray.experiment.steal import steal as run

    config = _config(read_base(file, overrides), url, key, api)
    folder = to if to is not None else Storage(config.storage).root / "stolen" / file.stem
    console, errors = make_console(), make_console(stderr=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("budget", "queries", "accuracy on the thief's test images", "seconds"):
        table.add_column(heading, justify="right")

    def on_rung(rung: StolenRung, where: Path) -> None:
        accuracy = "" if rung.accuracy is None else f"{100 * rung.accuracy:.1f}%"
        table.add_row(f"{rung.budget:,}", f"{rung.queries:,}", accuracy, f"{rung.seconds:.1f}")
        errors.print(f"budget {rung.budget:,}: {where}", soft_wrap=True)

    assert config.thief.blackbox is not None
    with errors.status(f"stealing from {escape(config.thief.blackbox.url)}"):
        run(config, folder, on_rung=on_rung, warn=lambda text: errors.print(escape(text), soft_wrap=True))
    console.print(table)
    console.print(f"stolen   {folder / 'substitutes'}", soft_wrap=True)


def _config(config: ExperimentConfig, url: str | None, key: str | None, api: Path | None) -> ExperimentConfig:
    given = {"url": url, "key": None if key is None else [key], "api": None if api is None else str(api.absolute())}
    changes = {name: value for name, value in given.items() if value is not None}
    tree = config.resolved()
    before = tree["thief"].get("blackbox")
    if not changes and before is None:
        raise ConfigError("no service to steal from is given; give a URL with --url, or set thief.blackbox.url")
    tree["thief"]["blackbox"] = {**(before or {}), **changes}
    return build(ExperimentConfig, tree)
