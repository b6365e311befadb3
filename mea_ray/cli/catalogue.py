"""``mea-ray list``: every component and every config path, with types, defaults and meanings."""

from __future__ import annotations

import importlib
from pathlib import Path

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from mea_ray.cli import sweeps
from mea_ray.cli.listing import component_listing, config_listing, names_table
from mea_ray.core.errors import ConfigError
from mea_ray.core.registry import Table
from mea_ray.core.words import nearest, nearest_and_known

BENCHMARKS = Table(
    "benchmark",
    {
        "efficiency": "mea_ray.bench.efficiency:bench_efficiency",
        "http": "mea_ray.bench.http:bench_http",
        "report": "mea_ray.bench.report:bench_report",
        "scheduling": "mea_ray.bench.scheduling:bench_scheduling",
        "service": "mea_ray.bench.service:bench_service",
        "storage": "mea_ray.bench.storage:bench_storage",
        "sweep": "mea_ray.bench.sweep:bench_sweep",
        "train": "mea_ray.bench.train:bench_train",
        "stack": "mea_ray.bench.stack:bench_stack",
        "views": "mea_ray.bench.views:bench_views",
    },
)
TABLES = {
    "watermarks": "mea_ray.watermarks:WATERMARKS",
    "pretexts": "mea_ray.pretext:PRETEXTS",
    "combiners": "mea_ray.watermarks.combiners:COMBINERS",
    "aggregators": "mea_ray.watermarks.aggregators:AGGREGATORS",
    "attacks": "mea_ray.attacks:ATTACKS",
    "removals": "mea_ray.removal:REMOVALS",
    "detections": "mea_ray.detection:DETECTIONS",
    "models": "mea_ray.models:MODELS",
    "datasets": "mea_ray.data:DATASETS",
    "policies": "mea_ray.blackbox:POLICIES",
    "benchmarks": "mea_ray.cli.catalogue:BENCHMARKS",
}
"""Maps a kind, as a user names it, to its table."""
KINDS = (*TABLES, "sweeps", "config")
"""What can be listed."""


def table(kind: str) -> Table:
    """Return the table of a kind."""
    module, _, attribute = TABLES[kind].partition(":")
    loaded: Table = getattr(importlib.import_module(module), attribute)
    return loaded


def show(console: Console, kind: str | None = None, name: str | None = None) -> None:
    """Print what there is.

    Args:
        console: Where to.
        kind: One of ``TABLES``, ``sweeps`` or ``config``, or the name of a component; everything when None.
        name: One component, or a section of the config.

    Raises:
        ConfigError: There is no such kind, component or section; the message gives the nearest one.
    """
    if kind is None:
        _show_everything(console)
        return
    if name is None and kind not in KINDS and (of := _kinds_of(kind)):
        for each in of:
            if len(of) > 1:
                console.print(f"[bold underline]{each}[/]")
            show(console, each, kind)
        return
    kind = _known(kind)
    if kind == "config":
        _show_config(console, name)
    elif kind == "sweeps":
        console.print(_sweeps_table([name] if name else sweeps.names()))
    else:
        entries = table(kind)
        for each in [name] if name else entries.names():
            try:
                console.print(component_listing(each, entries))
            except ConfigError as error:
                if name:
                    raise
                console.print(f"[bold]{escape(each)}[/]  cannot be used: {escape(str(error))}")  # of another package


def _kinds_of(name: str) -> list[str]:
    """Return the kinds that have a component, a sweep or a section of the config of this name."""
    kinds = [kind for kind in TABLES if name in table(kind).names()]
    return kinds + ["sweeps"] * (name in sweeps.names()) + ["config"] * (name in [*_sections(), "http"])


def _known(kind: str) -> str:
    """Return a kind as in `TABLES`; its singular is accepted, too.

    Raises:
        ConfigError: There is none.
    """
    plural = {each: each for each in KINDS} | {_singular(each): each for each in KINDS}
    if kind.lower() not in plural:
        names = [*KINDS, *(name for each in TABLES for name in table(each).names())]
        raise ConfigError(
            f"there is no kind and no component {kind!r}{nearest(kind, names) or '.'} Kinds: {', '.join(KINDS)}"
        )
    return plural[kind.lower()]


def _singular(kind: str) -> str:
    return {"policies": "policy", "config": "settings"}.get(kind, kind.removesuffix("s"))


def _show_everything(console: Console) -> None:
    for kind in TABLES:
        if kind != "benchmarks":
            console.print(f"[bold underline]{kind}[/]")
            console.print(names_table(table(kind)), "")
    console.print("[bold underline]sweeps[/]")
    console.print(_sweeps_table(sweeps.names()), "")
    console.print("mea-ray list KIND [NAME] shows the settings, mea-ray list config all other settings.")


def _sweeps_table(names: list[str]) -> RichTable:
    grid = RichTable(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name in names:
        sweeps.find(Path(name))  # refuses an unknown name
        grid.add_row(name, Text(sweeps.description(name)))
    return grid


def _show_config(console: Console, section: str | None) -> None:
    from mea_ray.config import ExperimentConfig, SweepConfig

    if section == "http":
        from mea_ray.service.http.settings import HttpConfig

        console.print(config_listing("http", "What `mea-ray serve` takes.", HttpConfig))
        return
    fields = _sections()
    if section is None:
        console.print(config_listing("experiment", "One experiment, or `base` of a sweep.", ExperimentConfig))
        console.print(config_listing("sweep", "A base experiment and the settings that vary.", SweepConfig, ("base",)))
        return
    if section not in fields:
        known = [*fields, "http"]
        raise ConfigError(f"the config has no section {section!r}{nearest_and_known(section, known)}")
    owner = ExperimentConfig if section in ExperimentConfig.model_fields else SweepConfig
    others = tuple(field for field in owner.model_fields if field != section)
    console.print(config_listing(section, fields[section].description or "", owner, others))


def _sections() -> dict[str, FieldInfo]:
    from mea_ray.config import ExperimentConfig, SweepConfig

    return {**SweepConfig.model_fields, **ExperimentConfig.model_fields}
