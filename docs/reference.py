"""The reference pages, generated from the registry and the config when mkdocs builds: no page can be out of date.

mkdocs calls ``on_files``; ``python docs/reference.py`` prints all pages.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from typing import TYPE_CHECKING

import typer

from mea_ray.cli import catalogue
from mea_ray.cli.listing import SettingRow, choice_of, component_rows, config_rows, setting_row, summary_of
from mea_ray.cli.main import app, main
from mea_ray.config import ExperimentConfig, SweepConfig
from mea_ray.core.registry import Table
from mea_ray.core.settings import Parameter
from mea_ray.report.markdown import table as markdown_table

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

HEADINGS = ("Setting", "Type", "Default", "Meaning")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Return every generated page: its path below ``docs`` to its Markdown."""
    return {
        "reference/settings.md": settings_page(),
        "reference/components.md": components_page(),
        "reference/command_line.md": command_line_page(),
    }


def settings_page() -> str:
    """Return every config path with its type, default and meaning, by section."""
    parts = [
        "# Settings",
        "Every setting is a config path. Set it in the YAML file, or after the file name on the command line: "
        "`mea-ray run experiment.yaml thief.budgets=500,1000`. Each component (`data`, `victim.model`, ...) also has "
        "its own settings, see [Components](components.md).",
        "## Experiment",
        "One experiment, or `base` of a sweep.",
    ]
    sections: dict[str, list[Parameter]] = {}
    for parameter in ExperimentConfig.parameters():
        head = parameter.name.split(".")[0] if "." in parameter.name else "top"
        sections.setdefault(head, []).append(parameter)
    for name, parameters in sections.items():
        if name != "top":
            parts.append(f"### {name}")
        parts.append(_table([setting_row(parameter) for parameter in parameters]))
    parts += ["## Sweep", _table([row for row in config_rows(SweepConfig) if row[0].split(".")[0] != "base"])]
    return "\n\n".join(parts) + "\n"


def components_page() -> str:
    """Return every component of every table with its settings."""
    parts = ["# Components", "`mea-ray list` also lists components of installed packages."]
    for kind in catalogue.TABLES:
        if kind == "benchmarks":
            continue
        table = catalogue.table(kind)
        parts.append(f"## {kind.capitalize()}")
        parts += [_component(name, table) for name in sorted(table.entries)]
    return "\n\n".join(parts) + "\n"


def _component(name: str, table: Table) -> str:
    component = table.resolve(name)
    text = f"### `{name}`\n\n{_escaped(summary_of(component))}"
    if choice_of(component) not in summary_of(component):
        text += f"\n\n{_escaped(choice_of(component))}"
    rows = component_rows(name, table)
    return f"{text}\n\n{_table(rows)}" if rows else text


def _table(rows: list[SettingRow]) -> str:
    return markdown_table(HEADINGS, [(f"`{row[0]}`", *map(_escaped, row[1:])) for row in rows]).replace("---:", "---")


def _escaped(text: str) -> str:
    """Return a docstring's text as Markdown: literals as code, everything else without markup."""
    parts = text.replace("``", "`").split("`")
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(r"([*_<\[])", r"\\\1", parts[place])
    return "`".join(parts)


def command_line_page() -> str:
    """Return the help of every command."""
    parts = ["# Command line", "`mea-ray COMMAND --help` shows the same."]
    for name in _commands():
        parts.append(f"## `mea-ray {name}`\n\n```text\n{_help(name.split())}\n```")
    return "\n\n".join(parts) + "\n"


def _commands() -> list[str]:
    """Return every command, and every command of a group, as it is typed after `mea-ray`."""
    names = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        names += [name, *(f"{name} {each}" for each in getattr(command, "commands", {}))]
    return names


def _help(command: list[str]) -> str:
    """Return what ``--help`` prints, 100 columns wide."""
    captured = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(captured):
            main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return "\n".join(line.rstrip() for line in captured.getvalue().strip().splitlines())


if __name__ == "__main__":
    sys.stdout.write("\n".join(pages().values()))
