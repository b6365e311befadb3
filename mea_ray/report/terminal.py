"""Output of the command line: tables, panels and lists, on a terminal or in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from mea_ray.report import (
    detections,
    leakage,
    many_points,
    points,
    removals,
    search,
    seeds,
    selection,
    spending,
    statistics,
    tables,
    verdict,
)
from mea_ray.results.points import setting, short_paths
from mea_ray.results.records import TrialResult
from mea_ray.verification import evidence

if TYPE_CHECKING:
    from mea_ray.config import PricesConfig, SearchConfig

PIPE_WIDTH = 160
TABLE_LINES = 30
"""Maximum number of lines of the table of results, including its head."""
HEAD_LINES = 5
SOME = 12
"""Maximum number of rows of any other table."""
NARROW = 100
"""Width of a terminal below which a rate is shown without its interval, in characters."""
MOST_VERDICT = 26
"""Characters in one line of a verdict."""
LEAST_VERDICT = 10
"""Characters of its longest word: a verdict must not be broken within words."""
LEAST_POINT = 20
"""Minimum number of characters in one line of a setting."""
LEAST_NAMED = 15
"""Characters in one line of a key: ``owner's: 2 of 3``."""
LEANING_HEADINGS = {
    "point": "Setting",
    "answers": "Answers",
    "named": "Key that\nfits best",
    "score": "Its score\n(next key)",
    "true": "Owner's\nkey: score",
    "rank": "Its rank",
    "nulls": "Innocent\nmodels",
}
LEFT_OUT: Mapping[int, frozenset[str]] = {
    150: frozenset(),
    NARROW: frozenset({"victim", "null", "fidelity", "wfpr"}),
    0: frozenset({"victim", "null", "fidelity", "wfpr", "accuracy", "p_value"}),
}
"""Omitted columns of the results by minimum terminal width; the report has all of them."""
TONES = {"good": "green", "mixed": "yellow", "bad": "red"}


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; in a pipe it is wide enough for the tables, and without colours."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def error_panel(text: str, title: str) -> Panel:
    """Return the red panel for an error."""
    return Panel(Text(text), title=f"Error: {escape(title)}", title_align="left", border_style="red")


def note(text: str) -> None:
    """Print a remark as one line on stderr."""
    make_console(stderr=True).print(f"[yellow]note[/] {escape(text)}", highlight=False, soft_wrap=True)


def results_table(rows: Sequence[tables.Row], width: int) -> RichTable:
    """Return the table of rungs: setting and verdict at any width, more columns if there is room.

    Args:
        rows: The rows.
        width: Width of the terminal, in characters.
    """
    columns = _columns(width)
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        left = column in {"point", "verdict"}
        table.add_column(
            _heading(column, width).replace(" ", "\n", 1),
            justify="left" if left else "right",
            overflow="fold",
            no_wrap=not left,
            min_width=LEAST_VERDICT if column == "verdict" else None,
            width=_point_width(rows, width) if column == "point" else None,
        )
    for row in rows:
        cells = [escape(_cell(row, column, width)) for column in columns]
        cells[-1] = f"[{TONES[row.tone]}]{cells[-1]}[/]"
        table.add_row(*cells)
    return table


def _columns(width: int) -> list[str]:
    left_out = next((names for least, names in LEFT_OUT.items() if width >= least), frozenset())
    return [column for column in tables.HEADINGS if column not in left_out]


def _cell(row: tables.Row, column: str, width: int) -> str:
    text = str(getattr(row, column))
    if column == "verdict":
        return text.partition(":")[0]  # the findings contain the reason
    return text.partition(" ")[0] if column == "wsr" and width < NARROW else text


def _heading(column: str, width: int) -> str:
    return "WSR" if column == "wsr" and width < NARROW else tables.HEADINGS[column]


def _point_width(rows: Sequence[tables.Row], width: int) -> int:
    """Return the width of the setting's column: the remaining width, but at least a few words."""
    others = 0
    for column in _columns(width):
        if column != "point":
            heading = max(map(len, _heading(column, width).split(" ", 1)))
            longest = max((len(_cell(row, column, width)) for row in rows), default=0)
            others += max(heading, min(longest, MOST_VERDICT) if column == "verdict" else longest) + 3
    return min(max((len(row.point) for row in rows), default=8), max(width - others - 1, LEAST_POINT))


def fitting(rows: Sequence[tables.Row], width: int) -> list[tables.Row]:
    """Return the rows that fit in a table of ``TABLE_LINES`` lines.

    Omitted first are thefts of innocent models, then smaller budgets, then the rows in the middle.
    """
    own = [row for row in rows if not row.control]
    last = [row for place, row in enumerate(own) if place + 1 == len(own) or own[place + 1].trial != row.trial]
    for some in (rows, own, last):
        if sum(_lines(row, rows, width) for row in some) <= TABLE_LINES - HEAD_LINES:
            return list(some)
    room = max(2, (TABLE_LINES - HEAD_LINES) // max(_lines(row, rows, width) for row in last))
    return [*last[: room - room // 2], *last[-(room // 2) :]]


def _lines(row: tables.Row, rows: Sequence[tables.Row], width: int) -> int:
    words = ceil(len(_cell(row, "verdict", width)) / MOST_VERDICT)
    room = _point_width(rows, width)
    return max(1 if len(row.point) <= room else ceil((len(row.point) + 8) / room), words)  # 8: words are not broken


def points_table(ranking: Sequence[points.PointResult], width: int) -> RichTable:
    """Return the table of the best and the worst points of a sweep of many, in at most ``TABLE_LINES`` lines."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, title="The best and the worst points", title_justify="left")
    columns = (0, 1, 2, 4) if width < NARROW else tuple(range(len(many_points.POINT_HEADINGS)))
    for place in columns:
        table.add_column(
            many_points.POINT_HEADINGS[place].replace(" ", "\n", 1),
            justify="right" if place > 1 else "left",
            overflow="fold",
            ratio=1 if place == 0 else None,
            no_wrap=place > 0,
        )
    in_order = points.ranked(ranking)
    listed = [many_points.point_cells(point) for point in in_order]
    others = 0
    for place in columns[1:]:
        heading = max(map(len, many_points.POINT_HEADINGS[place].split(" ", 1)))
        others += 3 + max([heading, *(len(cells[place]) for cells in listed)])
    room = max(width - others - 3, 12)
    longest = max((len(cells[0]) for cells in listed), default=0)
    lines = 1 if longest <= room else ceil((longest + 20) / room)  # 20: words are not broken
    edge = max(1, min(points.EDGE, len(in_order) // 2, (TABLE_LINES - HEAD_LINES - 2) // (2 * lines)))
    for place_of_part, part in enumerate((in_order[:edge], in_order[-edge:])):
        if place_of_part:
            table.add_section()
        for point in part:
            cells = [escape(text) for text in many_points.point_cells(point)]
            cells[1] = f"[{TONES[point.tone]}]{cells[1]}[/]"
            table.add_row(*(cells[place] for place in columns))
    return table


def importance_table(ranking: Sequence[points.PointResult]) -> RichTable:
    """Return the table of the settings' importance, most important first."""
    table = RichTable(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title="Variance that a setting explains alone",
        title_justify="left",
    )
    for place, heading in enumerate(("Setting", *points.OBJECTIVES)):
        table.add_column(heading.replace(" ", "\n", 1), justify="right" if place else "left", overflow="fold")
    short = short_paths(points.paths_of(ranking))
    for path, of in points.importances(ranking)[:SOME]:
        texts = (tables.DASH if value != value else tables.percent(value, 0) for value in of.values())
        table.add_row(escape(short[path]), *texts)
    return table


def removals_table(lines: Sequence[removals.RemovalRow], width: int) -> RichTable:
    """Return the table of all removals; on a narrow terminal, only setting, removal, results and verdict."""
    left_out = {"on", "accuracy", "wsr_lost", "p_value"} if width < NARROW else set()
    headings = {column: heading for column, heading in removals.HEADINGS.items() if column not in left_out}
    if width < NARROW:
        headings |= {"accuracy_lost": "Accuracy\nlost", "wsr": "WSR\nleft"}
    left = {"point", "removal", "on", "verdict"}
    least = {"point": LEAST_VERDICT, "removal": LEAST_POINT, "verdict": LEAST_VERDICT}
    return _table_of(lines, headings, left=left, toned="verdict", wrap_numbers=False, least=least)


def detections_table(lines: Sequence[detections.DetectionRow]) -> RichTable:
    """Return the table of all detections."""
    return _table_of(lines, detections.HEADINGS, left=set(detections.HEADINGS))


def leaning_table(lines: Sequence[leakage.LeaningRow], width: int) -> RichTable:
    """Return the table of what the answers give away; on a narrow terminal without scores."""
    left_out = {"score", "true", "nulls"} if width < NARROW else set()
    short = [
        replace(row, point=row.point.removeprefix("victim."), named=row.named.replace("the owner's in", "owner's:"))
        for row in lines
    ]
    return _table_of(
        short,
        {column: heading for column, heading in LEANING_HEADINGS.items() if column not in left_out},
        left={"point", "named"},
        toned="rank",
        wrap_numbers=False,
        least={"point": LEAST_POINT, "named": LEAST_NAMED},
        title="What the answers give away",
        title_justify="left",
        caption=leakage.CAPTION,
        caption_justify="left",
    )


def statistics_table(lines: Sequence[statistics.StatisticRow]) -> RichTable:
    """Return the table of statistics."""
    return _table_of(lines, statistics.HEADINGS, left={"statistic"})


def means_table(lines: Sequence[seeds.SeedsRow]) -> RichTable:
    """Return the table of means over seeds."""
    return _table_of(
        lines, seeds.HEADINGS, left={"point"}, wrap_numbers=False, caption=seeds.CAPTION, caption_justify="left"
    )


def _table_of(
    lines: Sequence[Any],
    headings: Mapping[str, str],
    *,
    left: Collection[str],
    toned: str = "",
    wrap_numbers: bool = True,
    least: Mapping[str, int] | None = None,
    **look: Any,
) -> RichTable:
    """Return the table of rows whose attributes are its columns.

    Args:
        lines: The rows.
        headings: Heading of each attribute.
        left: Columns of text; the others are numbers.
        toned: Column in the colour of the row's ``tone``.
        wrap_numbers: Whether a number can be wrapped if there is no room.
        least: Minimum widths of some columns, in characters.
        look: Title and caption.
    """
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, **look)
    for column, heading in headings.items():
        text = column in left
        table.add_column(
            heading,
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=not (text or wrap_numbers),
            min_width=(least or {}).get(column),
        )
    for line in lines:
        cells = {column: escape(str(getattr(line, column))) for column in headings}
        if toned:
            cells[toned] = f"[{TONES[line.tone]}]{cells[toned]}[/]"
        table.add_row(*cells.values())
    return table


def chosen_table(lines: Sequence[selection.Chosen]) -> RichTable:
    """Return the table of chosen settings."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, title="Chosen settings", title_justify="left")
    for place, heading in enumerate(selection.HEADINGS):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line.cells))
    return table


def outcome_table(outcome: search.SearchOutcome) -> RichTable:
    """Return the table of the best trials of a search, ``SOME`` of them."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, title=escape(outcome.title), title_justify="left")
    for place, heading in enumerate(outcome.headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold", no_wrap=place > 0)
    for line in outcome.lines[:SOME]:
        table.add_row(*map(escape, line))
    return table


def print_results(
    console: Console,
    results: Sequence[TrialResult],
    sought: SearchConfig | None = None,
    *,
    sweep: Sequence[TrialResult] | None = None,
    prices: PricesConfig | None = None,
    judged: evidence.JudgedSweep | None = None,
) -> None:
    """Print the tables and a summary of them.

    Args:
        console: The console.
        results: The trials.
        sought: The sweep's search, if there is one.
        sweep: All trials of the sweep, if ``results`` are some of them: verdicts are corrected for all.
        prices: Prices of an hour and of a query, if known.
        judged: The judgements on the sweep, if already made.
    """
    judged = evidence.JudgedSweep.of(sweep or results) if judged is None else judged
    short = tables.with_short_points(results)
    if tables.is_many(results):
        ranking = points.point_results(short, judged.rungs)
        console.print(points_table(ranking, console.width))
        if points.paths_of(ranking):
            console.print(importance_table(ranking))
    else:
        _print_rows(console, tables.rows(_by_short_paths(short), judged.rungs))
        _print_some(console, means_table, seeds.lines(short, judged.rungs))
    best = search.outcome(sought, _by_short_paths(short)) if sought is not None else None
    if best is not None:
        console.print(outcome_table(best))
        if len(best.lines) > SOME:
            console.print(f"{SOME} of {len(best.lines):,} lines; all are in the report")
    _print_some(console, statistics_table, statistics.lines(short))
    _print_some(console, partial(removals_table, width=console.width), removals.lines(short, judged.removals))
    _print_some(console, detections_table, detections.lines(short))
    _print_some(console, partial(leaning_table, width=console.width), leakage.lines(short))
    if picked := selection.chosen(short):
        console.print(chosen_table(picked))
    if (how := selection.sentence(short)) is not None:
        console.print(escape(how))
    for summary in verdict.summaries(results, judged.rungs):
        _print_summary(console, summary)
    console.print(escape(spending.sentence(results, prices).text))


def _print_summary(console: Console, summary: verdict.Summary) -> None:
    head, scheme = summary.headline, f"{summary.scheme}: " if summary.scheme else ""
    console.print(f"[bold {TONES[head.tone]}]{escape(scheme + head.text)}[/]")
    for heading, findings in summary.parts:
        console.print(f"  [dim]{heading}[/]")
        for finding in findings:
            line = Text.assemble((tables.MARKS[finding.tone], TONES[finding.tone]), f" {finding.text}")
            console.print(Padding(line, (0, 0, 0, 2)))


def _by_short_paths(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials with points whose config paths are as short as possible."""
    short = short_paths(list(dict.fromkeys(path for result in results for path in result.point)))
    return [
        result.model_copy(update={"point": {short[path]: value for path, value in result.point.items()}})
        for result in results
    ]


def _print_rows(console: Console, rows: Sequence[tables.Row]) -> None:
    fitted = fitting(rows, console.width)
    console.print(results_table(fitted, console.width))
    if len(fitted) < len(rows):
        console.print(f"{len(fitted)} of {len(rows):,} lines; all are in the report")


LineT = TypeVar("LineT")


def _print_some(console: Console, table: Callable[[Sequence[LineT]], RichTable], lines: Sequence[LineT]) -> None:
    """Print a table of at most ``SOME`` rows; nothing for an empty table."""
    if not lines:
        return
    console.print(table(lines[:SOME]))
    if len(lines) > SOME:
        console.print(f"{SOME} of {len(lines):,} lines; all are in the report")


def pairs_table(title: str, pairs: Iterable[tuple[str, Any]]) -> RichTable:
    """Return a table of names and values."""
    table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(name), escape(value if isinstance(value, str) else setting(value)))
    return table
