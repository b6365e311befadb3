"""What the command line shows: tables, panels and lists, on a terminal or in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_origin

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from mea_ray.report import best, detected, means, plane, tables, verdict
from mea_ray.results.records import TrialResult

if TYPE_CHECKING:
    from mea_ray.config import SearchConfig
    from mea_ray.core.registry import Table

PIPE_WIDTH = 160
ROWS = 200
"""Trials listed in a terminal; a sweep may have thousands."""
TONES = {"good": "green", "mixed": "yellow", "bad": "red"}


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; in a pipe it is wide enough for the tables, and without colours."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def error_panel(error: BaseException, *, title: str = "Error") -> Panel:
    """Return the one red panel that an error is shown in."""
    name = type(error).__name__
    return Panel(Text(str(error) or name), title=f"{title}: {name}", title_align="left", border_style="red")


def results_table(results: Sequence[TrialResult]) -> RichTable:
    """Return the table of all rungs of all trials."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in tables.HEADINGS.items():
        left = column in {"point", "verdict"}
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in tables.rows(results):
        cells = [escape(str(getattr(row, column))) for column in tables.HEADINGS]
        cells[-1] = f"[{'green' if row.good else 'red'}]{cells[-1]}[/]"
        table.add_row(*cells)
    return table


def removals_table(lines: Sequence[plane.Line]) -> RichTable:
    """Return the table of all removals."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in plane.HEADINGS.items():
        left = column in {"point", "removal", "on", "verdict"}
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for line in lines:
        cells = [escape(str(getattr(line, column))) for column in plane.HEADINGS]
        cells[-1] = f"[{'green' if line.good else 'red'}]{cells[-1]}[/]"
        table.add_row(*cells)
    return table


def detections_table(lines: Sequence[detected.Line]) -> RichTable:
    """Return the table of all detections."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for heading in detected.HEADINGS.values():
        table.add_column(heading, overflow="fold")
    for line in lines:
        table.add_row(*(escape(str(getattr(line, column))) for column in detected.HEADINGS))
    return table


def means_table(lines: Sequence[means.Line]) -> RichTable:
    """Return the table of means over seeds."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, caption=means.CAPTION, caption_justify="left")
    for column, heading in means.HEADINGS.items():
        left = column == "point"
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for line in lines:
        table.add_row(*(escape(str(getattr(line, column))) for column in means.HEADINGS))
    return table


def found_table(found: best.Found) -> RichTable:
    """Return the table of the best trials of a search."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, title=escape(found.title), title_justify="left")
    for place, heading in enumerate(found.headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold", no_wrap=place > 0)
    for line in found.lines:
        table.add_row(*map(escape, line))
    return table


def print_results(console: Console, results: Sequence[TrialResult], search: SearchConfig | None = None) -> None:
    """Print the tables and, in plain words, what they say.

    Args:
        console: Where to.
        results: The trials.
        search: What the sweep sought, if it sought something.
    """
    console.print(results_table(results[:ROWS] if len(results) > ROWS else results))
    if len(results) > ROWS:
        console.print(f"... and {len(results) - ROWS:,} more trials; all are in the report and in summary.csv")
    over_seeds = means.lines(results)
    if over_seeds:
        console.print(means_table(over_seeds[:ROWS]))
    sought = best.found(search, results) if search is not None else None
    if sought is not None:
        console.print(found_table(sought))
    removals = plane.lines(results)
    if removals:
        console.print(removals_table(removals))
    found = detected.lines(results)
    if found:
        console.print(detections_table(found))
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
        table.add_row(escape(name), escape(value if isinstance(value, str) else tables.setting(value)))
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
        shown.add_row(name, escape(summary_of(table.resolve(name))))
    return shown


def component_table(name: str, table: Table) -> RichTable:
    """Return the parameters of one component: type, default, meaning."""
    parameters = table.parameters(name)
    return _parameters_table(
        f"[bold]{name}[/]  {escape(summary_of(table.resolve(name)))}",
        [(p.name, p.type, tables.setting(p.default), p.doc) for p in parameters if not p.name.startswith("on_")],
    )


def config_table(title: str, model: Any, skip: Sequence[str] = ()) -> RichTable:
    """Return every config path of a section, without the fields ``skip``, with its type, default and meaning."""
    return _parameters_table(title, [row for row in config_rows(model) if row[0].split(".")[0] not in skip])


def config_rows(model: Any, prefix: str = "") -> Iterable[tuple[str, str, str, str]]:
    """Yield ``(path, type, default, meaning)`` of every leaf below a config model."""
    from mea_ray.config import Choice, Config

    for name, field in model.model_fields.items():
        kind = field.annotation
        inner = next((k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Config)), None)
        meaning = field.description or ""
        if inner is not None and issubclass(inner, Choice) and inner is kind:
            default = field.get_default(call_default_factory=True)
            yield f"{prefix}{name}.name", inner.components().kind, default.name, meaning
        elif inner is not None and not issubclass(inner, Choice):
            if inner is not kind:
                yield f"{prefix}{name}", "null or section", "none", meaning
            yield from config_rows(inner, f"{prefix}{name}.")
        else:
            default = (
                "required" if field.is_required() else tables.setting(field.get_default(call_default_factory=True))
            )
            yield f"{prefix}{name}", type_text(kind), default, meaning


def type_text(kind: Any) -> str:
    """Return an annotation as a user would write it."""
    if kind is type(None):
        return "null"
    if get_origin(kind) is None:
        return getattr(kind, "__name__", str(kind))
    if (
        get_origin(kind) in {tuple, list, dict}
        or isinstance(get_origin(kind), type)
        and issubclass(get_origin(kind), Mapping)
    ):
        inside = [type_text(k) for k in get_args(kind) if k is not Ellipsis]
        return f"{get_origin(kind).__name__.lower()} of {', '.join(inside)}"
    return " | ".join(str(k) if isinstance(k, str) else type_text(k) for k in get_args(kind))


def _parameters_table(title: str, rows: Sequence[tuple[str, str, str, str]]) -> RichTable:
    shown = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, title_style="")
    for heading in ("Parameter", "Type", "Default", "Meaning"):
        shown.add_column(heading, overflow="fold", style="bold" if heading == "Parameter" else None)
    for row in rows:
        shown.add_row(*map(escape, row))
    if not rows:
        shown.add_row("[dim]none[/]", "", "", "")
    return shown
