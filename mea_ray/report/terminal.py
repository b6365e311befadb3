"""What the command line shows: tables, panels and lists, on a terminal or in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from mea_ray.report import detections, leaning, removals, search, seeds, selection, statistics, tables, verdict
from mea_ray.results.points import setting
from mea_ray.results.records import TrialResult

if TYPE_CHECKING:
    from mea_ray.config import SearchConfig

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


def note(text: str) -> None:
    """Print a remark on stderr, on one line."""
    make_console(stderr=True).print(f"[yellow]note[/] {escape(text)}", highlight=False, soft_wrap=True)


def results_table(results: Sequence[TrialResult]) -> RichTable:
    """Return the table of all rungs of all trials."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in tables.HEADINGS.items():
        left = column in {"point", "verdict"}
        two_lines = heading.replace(" ", "\n", 1)
        table.add_column(two_lines, justify="left" if left else "right", overflow="fold", no_wrap=not left)
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


def leaning_table(lines: Sequence[leaning.LeaningRow]) -> RichTable:
    """Return the table of what the answers give away."""
    table = RichTable(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title="What the answers give away",
        title_justify="left",
        caption=leaning.CAPTION,
        caption_justify="left",
    )
    for column, heading in leaning.HEADINGS.items():
        table.add_column(heading, justify="left" if column in {"point", "named"} else "right", overflow="fold")
    for line in lines:
        cells = [escape(str(getattr(line, column))) for column in leaning.HEADINGS]
        cells[-2] = f"[{TONES[line.tone]}]{cells[-2]}[/]"
        table.add_row(*cells)
    return table


def statistics_table(lines: Sequence[statistics.StatisticRow]) -> RichTable:
    """Return the table of statistics."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in statistics.HEADINGS.items():
        table.add_column(heading, justify="left" if column == "statistic" else "right", overflow="fold")
    for line in lines:
        table.add_row(*(escape(str(getattr(line, column))) for column in statistics.HEADINGS))
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


def chosen_table(lines: Sequence[selection.Chosen]) -> RichTable:
    """Return the table of chosen settings."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, title="Chosen settings", title_justify="left")
    for place, heading in enumerate(selection.HEADINGS):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line.cells))
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
    results = tables.with_short_points(results)
    console.print(results_table(results[:ROWS] if len(results) > ROWS else results))
    if len(results) > ROWS:
        console.print(f"... and {len(results) - ROWS:,} more trials; all are in the report and in summary.csv")
    over_seeds = seeds.lines(results)
    if over_seeds:
        console.print(means_table(over_seeds[:ROWS]))
    best = search.found(sought, results) if sought is not None else None
    if best is not None:
        console.print(found_table(best))
    if separation := statistics.lines(results):
        console.print(statistics_table(separation))
    if removed := removals.lines(results):
        console.print(removals_table(removed))
    if detected := detections.lines(results):
        console.print(detections_table(detected))
    if given_away := leaning.lines(results):
        console.print(leaning_table(given_away[:ROWS]))
    if picked := selection.chosen(results):
        console.print(chosen_table(picked))
    if (how := selection.sentence(results)) is not None:
        console.print(escape(how))
    for summary in verdict.summaries(results):
        head, scheme = summary.headline, f"{summary.scheme}: " if summary.scheme else ""
        console.print(f"[bold {TONES[head.tone]}]{escape(scheme + head.text)}[/]")
        for finding in summary.findings:
            console.print(f"  [{TONES[finding.tone]}]{tables.MARKS[finding.tone]}[/] {escape(finding.text)}")


def pairs_table(title: str, pairs: Iterable[tuple[str, Any]]) -> RichTable:
    """Return a table of names and values."""
    table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(name), escape(value if isinstance(value, str) else setting(value)))
    return table
