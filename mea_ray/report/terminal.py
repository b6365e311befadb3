"""What the command line shows: tables, panels and lists, on a terminal or in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from mea_ray.core.errors import ConfigError
from mea_ray.report import detections, removals, search, seeds, tables, verdict
from mea_ray.results.points import setting
from mea_ray.results.records import TrialResult

if TYPE_CHECKING:
    from mea_ray.config import SearchConfig
    from mea_ray.core.registry import Table
    from mea_ray.core.settings import Parameter, Settings

PIPE_WIDTH = 160
ROWS = 200
"""Trials listed in a terminal; a sweep may have thousands."""
TONES = {"good": "green", "mixed": "yellow", "bad": "red"}


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; in a pipe it is wide enough for the tables, and without colours."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def error_panel(text: str, title: str) -> Panel:
    """Return the one red panel that an error is shown in."""
    return Panel(Text(text), title=f"Error: {escape(title)}", title_align="left", border_style="red")


def results_table(results: Sequence[TrialResult]) -> RichTable:
    """Return the table of all rungs of all trials."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in tables.HEADINGS.items():
        left = column in {"point", "verdict"}
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in tables.rows(results):
        cells = [escape(str(getattr(row, column))) for column in tables.HEADINGS]
        cells[-1] = f"[{TONES[row.tone]}]{cells[-1]}[/]"
        table.add_row(*cells)
    return table


def removals_table(lines: Sequence[removals.RemovalRow]) -> RichTable:
    """Return the table of all removals."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in removals.HEADINGS.items():
        left = column in {"point", "removal", "on", "verdict"}
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for line in lines:
        cells = [escape(str(getattr(line, column))) for column in removals.HEADINGS]
        cells[-1] = f"[{TONES[line.tone]}]{cells[-1]}[/]"
        table.add_row(*cells)
    return table


def detections_table(lines: Sequence[detections.DetectionRow]) -> RichTable:
    """Return the table of all detections."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for heading in detections.HEADINGS.values():
        table.add_column(heading, overflow="fold")
    for line in lines:
        table.add_row(*(escape(str(getattr(line, column))) for column in detections.HEADINGS))
    return table


def means_table(lines: Sequence[seeds.SeedsRow]) -> RichTable:
    """Return the table of means over seeds."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, caption=seeds.CAPTION, caption_justify="left")
    for column, heading in seeds.HEADINGS.items():
        left = column == "point"
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for line in lines:
        table.add_row(*(escape(str(getattr(line, column))) for column in seeds.HEADINGS))
    return table


def found_table(found: search.Found) -> RichTable:
    """Return the table of the best trials of a search."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, title=escape(found.title), title_justify="left")
    for place, heading in enumerate(found.headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold", no_wrap=place > 0)
    for line in found.lines:
        table.add_row(*map(escape, line))
    return table


def print_results(console: Console, results: Sequence[TrialResult], sought: SearchConfig | None = None) -> None:
    """Print the tables and, in plain words, what they say.

    Args:
        console: Where to.
        results: The trials.
        sought: The sweep's search, if it looked for the best trials.
    """
    console.print(results_table(results[:ROWS] if len(results) > ROWS else results))
    if len(results) > ROWS:
        console.print(f"... and {len(results) - ROWS:,} more trials; all are in the report and in summary.csv")
    over_seeds = seeds.lines(results)
    if over_seeds:
        console.print(means_table(over_seeds[:ROWS]))
    best = search.found(sought, results) if sought is not None else None
    if best is not None:
        console.print(found_table(best))
    if removed := removals.lines(results):
        console.print(removals_table(removed))
    if detected := detections.lines(results):
        console.print(detections_table(detected))
    head = verdict.headline(results)
    console.print(f"[bold {TONES[head.tone]}]{escape(head.text)}[/]")
    for finding in verdict.findings(results):
        console.print(f"  [{TONES[finding.tone]}]•[/] {escape(finding.text)}")


def pairs_table(title: str, pairs: Iterable[tuple[str, Any]]) -> RichTable:
    """Return a table of names and values."""
    table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(name), escape(value if isinstance(value, str) else setting(value)))
    return table


def summary_of(component: Any) -> str:
    """Return the first sentence of a docstring."""
    return (component.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").strip()


def names_table(title: str, table: Table) -> RichTable:
    """Return the names of a table of components, each with its first sentence."""
    shown = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name in table.names():
        shown.add_row(name, escape(_about(name, table)))
    for name, other in table.hidden().items():
        shown.add_row("", escape(f"{name} hides {other}; write module:attribute for that"))
    return shown


def _about(name: str, table: Table) -> str:
    """Return the first sentence of a component and where it comes from; what is wrong with it if it cannot be used."""
    try:
        summary = summary_of(table.resolve(name))
    except ConfigError as error:
        return f"cannot be used: {error}"
    return f"{summary} [{table.origin(name)}]" if table.origin(name) else summary


def component_table(name: str, table: Table) -> RichTable:
    """Return the parameters of one component: type, default, meaning."""
    parameters = table.parameters(name)
    return _parameters_table(
        f"[bold]{escape(name)}[/]  {escape(_about(name, table))}",
        [parameter_row(parameter) for parameter in parameters if not parameter.name.startswith("on_")],
    )


def config_table(title: str, model: Any, skip: Sequence[str] = ()) -> RichTable:
    """Return every config path of a section, without the fields ``skip``, with its type, default and meaning."""
    return _parameters_table(title, [row for row in config_rows(model) if row[0].split(".")[0] not in skip])


def config_rows(model: type[Settings]) -> list[tuple[str, str, str, str]]:
    """Return ``(path, type, default, meaning)`` of every setting below a config model."""
    return [parameter_row(parameter) for parameter in model.parameters()]


def parameter_row(parameter: Parameter) -> tuple[str, str, str, str]:
    """Return name, type with range, default and meaning of a setting, as texts."""
    default = "required" if parameter.default is PydanticUndefined else setting(parameter.default)
    return parameter.name, f"{parameter.type} {parameter.range}".strip(), default, parameter.doc


def _parameters_table(title: str, rows: Sequence[tuple[str, str, str, str]]) -> RichTable:
    shown = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, title_style="")
    for heading in ("Parameter", "Type", "Default", "Meaning"):
        shown.add_column(heading, overflow="fold", style="bold" if heading == "Parameter" else None)
    for row in rows:
        shown.add_row(*map(escape, row))
    if not rows:
        shown.add_row("[dim]none[/]", "", "", "")
    return shown
