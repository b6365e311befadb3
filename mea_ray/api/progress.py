"""Progress of a long call, in a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Update = Callable[[str, int, int | None], None]
"""Called with a description, the amount done, and the total (None if unknown)."""


@contextmanager
def bar(enabled: bool) -> Iterator[Update]:
    """Show one bar while the block runs; in a notebook it is drawn in the cell."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def update(text: str, done: int, of: int | None) -> None:
            progress.update(task, description=text, completed=done, total=of)

        yield update


def epochs(update: Update) -> Callable[[Any, str, dict[str, Any]], None]:
    """Return a listener for the epochs of a training."""

    def on_epoch(role: Any, name: str, record: dict[str, Any]) -> None:
        stage = record.get("stage", "")
        update(f"{str(role).replace('_', ' ')}, {stage}", int(record.get("epoch", 0)), int(record.get("epochs", 0)))

    return on_epoch


def events(update: Update) -> Callable[[Any], None]:
    """Return a listener for the events of a sweep: trials that ended, and trials that are running."""
    from mea_ray.sweep import events as e

    done, of, doing = 0, None, "starting"

    def on_event(event: Any) -> None:
        nonlocal done, of, doing
        if isinstance(event, e.SweepStarted):
            done, of, doing = event.finished, event.trials, "trials"
        elif isinstance(event, (e.TrialFinished, e.TrialFailed)):
            done += 1
        elif isinstance(event, e.ModelEpoch):
            doing = f"training {event.role} {event.name[:8]}, epoch {event.epoch}/{max(event.epochs, event.epoch)}"
        elif isinstance(event, e.Queried):
            doing = f"{event.answers:,} of {event.budget:,} queries"
        elif isinstance(event, e.Phase):
            doing = f"{event.what} {event.number}/{event.of}"
        update(doing, done, of)

    return on_event
