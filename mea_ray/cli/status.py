"""``mea-ray status``: the progress of a sweep on one screen; and ``mea-ray report --watch``."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from mea_ray.cli.progress import SweepProgress
from mea_ray.report.tables import DASH
from mea_ray.report.terminal import pairs_table
from mea_ray.results.points import label, shortened
from mea_ray.results.records import RESULTS
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.status import Status, read_status

MAX_TRIALS = 20
"""Running and failed trials listed."""


def duration(seconds: float | None) -> str:
    """Return a duration as text, e.g. ``1 h 05 min``; a dash for None."""
    if seconds is None:
        return DASH
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def print_status(console: Console, status: Status, *, lines: int = 8, now: float | None = None) -> None:
    """Print the progress of a sweep.

    Args:
        console: Where to.
        status: Its progress.
        lines: Number of recent events to show.
        now: Current time in seconds since the epoch; None reads the clock.
    """
    now = time.time() if now is None else now
    rate, of = status.rate(), f" of {status.planned:,}"
    stopped = f" ({status.stopped:,} stopped early)" if status.stopped else ""
    totals = {
        "state": _state(status, now),
        "done": f"{status.done:,}{of}{stopped}",
        "running": f"{len(status.running):,}",
        "failed": f"{len(status.failed):,}",
        "waiting": f"{status.waiting:,}",
        "models ready": f"{status.models:,} of {status.models_planned:,}",
        "queries answered": f"{status.queries:,} of at most {status.queries_planned:,}",
        "rate": DASH if rate is None else f"{3600 * rate:,.1f} trials an hour",
        "time left": f"about {duration(status.seconds_left())}" if rate and status.state(now) == "running" else DASH,
    }
    console.print(pairs_table(f"[bold]{escape(status.name)}[/]", totals.items()))
    if status.running:
        console.print(_running(status, now))
    for trial, reason in list(status.failed.items())[:MAX_TRIALS]:
        console.print(f"[red]failed[/] {trial[:8]}: {escape(reason)}", soft_wrap=True)
    for line in _recent(status, lines, now):
        console.print(line, soft_wrap=True)


def _state(status: Status, now: float) -> str:
    state = status.state(now)
    ago = "" if status.last_seen is None else f", last seen {duration(now - status.last_seen)} ago"
    values = {
        "running": f"running{ago}",
        "silent": f"silent{ago}: its driver was killed or cannot write; continue with --resume",
        "done": f"done{ago}",
        "interrupted": f"interrupted{ago}; continue with --resume",
        "failed": f"ended by an error{ago}; continue with --resume",
        "unknown": "unknown: it has no log of events",
    }[state]
    return values


def _running(status: Status, now: float) -> RichTable:
    short = _labels(status)
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("Running", "Queries", "Rungs", "For", "Restarts"):
        table.add_column(heading, justify="left" if heading == "Running" else "right", overflow="fold")
    for name, trial in list(status.running.items())[:MAX_TRIALS]:
        table.add_row(
            escape(short.get(name, name)),
            f"{trial.answers:,}/{trial.budget:,}",
            f"{trial.rungs}/{trial.of_rungs}",
            duration(now - trial.since),
            str(trial.restarts or ""),
        )
    return table


def _labels(status: Status) -> dict[str, str]:
    """Return the labels of the trials that have started: the settings that distinguish them."""
    short = zip(status.points, shortened(list(status.points.values())), strict=True)
    return {name: label(point, seeds=True) for name, point in short if point}


def _recent(status: Status, lines: int, now: float) -> list[Text]:
    """Return the recent events as the sweep itself shows them, each with its age."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=10_000, highlight=False)
    progress = SweepProgress(console, clock=lambda: 0.0, points=list(status.points.values()))
    progress.line = lambda text: console.print(text, soft_wrap=True)  # type: ignore[method-assign]
    rows: list[Text] = []
    progress.names.update(_labels(status))
    for at, event in status.recent:
        buffer.seek(0)
        buffer.truncate()
        progress(event)
        text = " ".join(buffer.getvalue().split())
        if text:
            rows.append(Text(f"{duration(now - at):>10} ago  {text}"))
    return rows[-lines:] if lines > 0 else []


def watch(
    folder: SweepFolder,
    render: Callable[[], Path],
    notify: Callable[[str], None],
    *,
    every_s: float = 30.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Path | None:
    """Render a report whenever there are new results, until the sweep has ended.

    Args:
        folder: The sweep's folder.
        render: Renders the report atomically and returns its path.
        notify: Called with a sentence after each rendering.
        every_s: Seconds between two checks.
        sleep: Sleeps for a number of seconds.

    Returns:
        Path of the report; None if the sweep ended without a result.
    """
    seen: list[tuple[str, int]] = []
    page: Path | None = None
    while True:
        status = read_status(folder)  # read first: the next check finds what ends after this one
        ended = status.state() != "running"
        folder.storage.pull_folder(f"{folder.name}/{RESULTS}")
        results = folder.path / RESULTS
        now = [(path.name, path.stat().st_mtime_ns) for path in sorted(results.glob("[!.]*.json"))]
        if now != seen:
            page, seen = render(), now
            notify(f"{status.done:,} of {status.planned:,} trials done: {page}")
        if ended:
            notify(f"the sweep is {status.state()}")
            return page
        sleep(every_s)
