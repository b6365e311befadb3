"""Live progress of a sweep: bars on a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatchmethod
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from mea_ray.report.tables import percent
from mea_ray.results.points import label, shortened
from mea_ray.sweep import events as e

SILENT_S = 8.0
"""Seconds without output after which a log lists the running trials."""
LISTED = 3
"""Trials in such a line."""


def duration(seconds: float) -> str:
    """Return a rounded duration: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class SweepProgress:
    """Shows the events of a sweep.

    Args:
        console: Where to show them: on a terminal, bars below the lines; elsewhere, lines only.
        clock: A monotonic clock, in seconds.
        points: Points of the sweep, as far as they are known; a trial is labelled by the settings that distinguish it.
    """

    def __init__(
        self,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
        points: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.short = {_key(point): short for point, short in zip(points, shortened(points), strict=True)}
        self.console = console
        self.clock = clock
        self.began = clock()
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.names: dict[str, str] = {}
        self.epochs: dict[str, float] = {}
        self.queried: dict[str, int] = {}
        self.phases: dict[str, str] = {}
        self.left = 0
        self.finished = 0
        self.first = float("nan")
        self.printed = self.began
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="progress", daemon=True)

    def __enter__(self) -> SweepProgress:
        self.bars.start()
        if not self.console.is_terminal:  # the bars move by themselves
            self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self.bars.stop()

    def __call__(self, event: e.Event) -> None:
        """Show one event."""
        with self._turn:
            self._show(event)

    def _beat(self) -> None:
        while not self._stop.wait(1.0):
            with self._turn:
                self.beat()

    def beat(self) -> None:
        """List the running trials, if nothing was printed for ``SILENT_S``."""
        if self.clock() - self.printed < SILENT_S:
            return
        under_way = [f"{self._name(trial)}: {phase}" for trial, phase in self.phases.items()]
        more = f" and {len(under_way) - LISTED} more" if len(under_way) > LISTED else ""
        text = "; ".join(under_way[:LISTED]) + more if under_way else "waiting for the first trial"
        left = self._left()
        self.line(f"[dim]{text}{f'; {left}' if left else ''}[/]")

    def _left(self) -> str:
        """Return the estimated time of the remaining trials, from those that ended; empty before the first."""
        left = self.left - self.finished
        if not self.finished or left <= 0:
            return ""
        seconds = (self.clock() - self.first) / self.finished * left
        return f"{left} left, about {duration(seconds)}"

    def line(self, text: str) -> None:
        """Print one line above the bars, with the seconds since the start."""
        self.printed = self.clock()
        self.console.print(f"[dim]{self.clock() - self.began:6.1f} s[/]  {text}", soft_wrap=True)

    def _bar(self, key: str, description: str, total: float, completed: float, note: str = "") -> None:
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(escape(description), total=total, note="")
        self.bars.update(
            self.tasks[key], description=escape(description), total=total, completed=completed, note=escape(note)
        )

    def _drop(self, key: str) -> None:
        if key in self.tasks:
            self.bars.remove_task(self.tasks.pop(key))

    def _label(self, point: Mapping[str, Any]) -> str:
        return label(self.short.get(_key(point), point), seeds=True)

    def _name(self, trial: str) -> str:
        return escape(self.names.get(trial, trial))

    @singledispatchmethod
    def _show(self, event: e.Event) -> None:
        self.line(f"[dim]{escape(str(event))}[/]")  # an event of a newer version

    @_show.register
    def _(self, event: e.SweepStarted) -> None:
        done = f", {event.finished} finished before" if event.finished else ""
        self.line(
            f"{event.trials} trials{done}; {event.victims} victims and {event.nulls} null models; "
            f"at most {event.queries:,} queries; writing to {escape(event.folder)}"
        )
        self.left = event.trials - event.finished
        self._bar("sweep", "trials", event.trials, event.finished)

    @_show.register
    def _(self, event: e.ModelEpoch) -> None:
        key = f"{event.role} {event.name[:8]}"
        loss = event.record.get("loss")
        note = f"loss {loss:.3f}" if isinstance(loss, (int, float)) else ""
        total = max(event.epochs, event.epoch)
        self._bar(key, f"training {key}", total, event.epoch, note)
        if event.record.get("resumed"):
            self.line(f"training {key} continues after epoch {event.epoch}/{total}")
            return
        # In a log, a line for every tenth of the epochs, but at most one in five seconds.
        due = event.epoch * 10 // total > (event.epoch - 1) * 10 // total
        if not self.console.is_terminal and due and self.clock() - self.epochs.get(key, float("-inf")) >= 5:
            self.epochs[key] = self.clock()
            self.line(f"training {key}: epoch {event.epoch}/{total} {note}")

    @_show.register
    def _(self, event: e.ModelReady) -> None:
        self._drop(f"{event.role} {event.name[:8]}")
        self.line(f"{event.role} {event.name[:8]} is ready")

    @_show.register
    def _(self, event: e.ServiceStarted) -> None:
        self.line(f"service of victim {event.victim[:8]} is up")

    @_show.register
    def _(self, event: e.TrialStarted) -> None:
        if self.first != self.first:
            self.first = self.clock()
        self.phases[event.trial] = "queries"
        how = "goes on" if event.trial in self.names else "started"
        self.names[event.trial] = self._label(event.point) if event.point else event.trial
        self._bar(event.trial, self.names[event.trial], max(event.budgets), 0, "queries")
        done = f", {event.rungs_done} of {len(event.budgets)} rungs done before" if event.rungs_done else ""
        self.line(f"{self._name(event.trial)}: {how}{done}")

    @_show.register
    def _(self, event: e.Queried) -> None:
        self._bar(event.trial, self.names.get(event.trial, event.trial), event.budget, event.answers, "queries")
        if event.answers >= event.budget and self.queried.get(event.trial) != event.answers:
            self.queried[event.trial] = event.answers
            self.line(f"{self._name(event.trial)}: {event.answers:,} queries answered")

    @_show.register
    def _(self, event: e.Phase) -> None:
        self.phases[event.trial] = f"{event.what} {event.number}/{event.of}"
        if event.trial in self.tasks:
            self.bars.update(self.tasks[event.trial], note=self.phases[event.trial])

    @_show.register
    def _(self, event: e.SubstituteEpoch) -> None:
        phase = self.phases.get(event.trial, "substitute").partition(", epoch")[0]
        self.phases[event.trial] = f"{phase}, epoch {event.epoch}/{event.epochs}"
        if event.trial in self.tasks:
            self.bars.update(self.tasks[event.trial], note=self.phases[event.trial])

    @_show.register
    def _(self, event: e.RungFinished) -> None:
        measures = f"accuracy {percent(event.accuracy)}, fidelity {percent(event.fidelity)}"
        wsr = f"[bold]WSR {percent(event.wsr)}[/], WFPR {percent(event.wfpr)}"
        if event.trial in self.tasks:
            self.bars.update(self.tasks[event.trial], note=f"WSR {percent(event.wsr)} at {event.queries:,}")
        self.line(f"{self._name(event.trial)}: {event.queries:,} queries: {measures}, {wsr}")

    @_show.register
    def _(self, event: e.Tried) -> None:
        what = f"{event.what} of the" if event.what == "theft" else f"{event.what} on the"
        outcome = f"accuracy {percent(event.accuracy)}, WSR {percent(event.wsr)}"
        if event.accuracy is None:
            outcome = f"flags {', '.join(event.flagged)}" if event.flagged else "flags nothing"
        self.line(f"{self._name(event.trial)}: {what} {event.tried_on.replace('_', ' ')}: {escape(outcome)}")

    @_show.register
    def _(self, event: e.TrialRestarted) -> None:
        self.line(f"[yellow]{self._name(event.trial)}: going on in another process[/] ({escape(event.reason)})")

    @_show.register
    def _(self, event: e.TrialMadeWay) -> None:
        if event.trial in self.tasks:  # no line: the service itself reports that it is down
            self.bars.update(self.tasks[event.trial], note="waits for its service")

    @_show.register
    def _(self, event: e.TrialFailed) -> None:
        self._drop(event.trial)
        self.phases.pop(event.trial, None)
        self.finished += 1
        self.line(f"[red]{self._name(event.trial)}: failed[/] ({escape(event.reason)})")

    @_show.register
    def _(self, event: e.TrialFinished) -> None:
        self._drop(event.trial)
        self.phases.pop(event.trial, None)
        self.finished += 1
        if "sweep" in self.tasks:
            self.bars.advance(self.tasks["sweep"])
            self.bars.update(self.tasks["sweep"], note=self._left())
        how = "stopped by the scheduler" if event.stopped else "finished"
        self.line(f"[green]{self._name(event.trial)}: {how}[/]")

    @_show.register
    def _(self, event: e.Warned) -> None:
        self.line(f"[yellow]warning[/] {escape(event.message)}")


def _key(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True, default=str)
