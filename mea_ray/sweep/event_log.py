"""The event log of a sweep in the storage, one line per event, through which other processes follow it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mea_ray.core.errors import StorageUnavailable
from mea_ray.sweep import events
from mea_ray.sweep.folder import SweepFolder

EVENTS = "events.jsonl"
BEAT, ENDED = "Beat", "Ended"
"""Lines other than events: the driver is alive; the driver has ended, with ``how``: done, interrupted or failed."""
BEAT_S = 30.0
_OFTEN_S, _PUSH_S = 10.0, 15.0

logger = logging.getLogger(__name__)


class EventLog:
    """Appends events to ``events.jsonl``.

    Epoch and query events, which come many times a second, are written once in ten seconds per model or trial, and at
    the end. A full disk stops the log but not the sweep.

    Args:
        folder: The sweep's folder.
        clock: Seconds since the epoch.
    """

    def __init__(self, folder: SweepFolder, clock: Callable[[], float] = time.time) -> None:
        self.folder, self.clock = folder, clock
        self._lock = threading.Lock()
        self._often: dict[str, float] = {}
        self._fails = False
        self._last = self._pushed = clock()
        folder.storage.pull_grown(f"{folder.name}/{EVENTS}", to_go_on=True)
        path = folder.path / EVENTS
        torn = path.exists() and path.read_bytes()[-1:] not in {b"", b"\n"}
        self._file = path.open("a", encoding="utf-8")
        if torn:  # by a kill; readers skip the damaged line
            self._file.write("\n")

    def __call__(self, event: events.Event) -> None:
        """Write an event."""
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        if isinstance(event, events.ModelEpoch):
            fields["record"] = {key: value for key, value in event.record.items() if key == "resumed"}
            if self._too_often(event.name, event.epoch >= event.epochs) and not fields["record"]:
                return
        if isinstance(event, events.Queried) and self._too_often(event.trial, event.answers >= event.budget):
            return
        if isinstance(event, events.SubstituteEpoch) and self._too_often(f"{event.trial} epochs", False):
            return
        if isinstance(event, (events.TrialFinished, events.TrialFailed)):
            self._often.pop(event.trial, None)
        self._write(type(event).__name__, fields)

    def beat(self) -> None:
        """Write a heartbeat if nothing else was written for ``BEAT_S``; copy the log to remote storage."""
        if self.clock() - self._last >= BEAT_S:
            self._write(BEAT, {})
        if self.clock() - self._pushed >= _PUSH_S:
            self._pushed = self.clock()
            self._push()

    def close(self, how: str) -> None:
        """Write how the sweep ended."""
        self._write(ENDED, {"how": how})
        with contextlib.suppress(OSError):  # a full disk, which was reported already
            self._file.close()
        self._push()
        self._remotely(self.folder.storage.merge_grown)

    def _too_often(self, key: str, is_last: bool) -> bool:
        now = self.clock()
        if not is_last and now - self._often.get(key, float("-inf")) < _OFTEN_S:
            return True
        self._often[key] = now
        return False

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        line = json.dumps({"t": round(self.clock(), 3), "event": name, **fields}, default=str)
        with self._lock:
            self._last = self.clock()
            try:
                self._file.write(line + "\n")
                self._file.flush()
                self._fails = False
            except (OSError, ValueError) as error:
                if not self._fails:
                    logger.warning("%s cannot be written: %s; the sweep continues", EVENTS, error)
                self._fails = True

    def _push(self) -> None:
        self._remotely(self.folder.storage.push_grown)

    def _remotely(self, do: Callable[[str], None]) -> None:
        try:
            do(f"{self.folder.name}/{EVENTS}")
        except (OSError, StorageUnavailable) as error:
            logger.warning("%s cannot be copied to %s: %s", EVENTS, self.folder.location, error)


def read(path: Path) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """Read (time, name, fields) of each line; damaged or incomplete ones are skipped, a missing file is empty."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    fields = json.loads(line)
                    yield float(fields.pop("t")), str(fields.pop("event")), fields
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
    except FileNotFoundError:
        return


def event_of(name: str, fields: dict[str, Any]) -> events.Event | None:
    """Return the event of a line; None for other lines, or events of another version."""
    kind = getattr(events, name, None)
    if not (isinstance(kind, type) and issubclass(kind, events.Event)):
        return None
    try:
        return kind(**fields)
    except TypeError:
        return None
