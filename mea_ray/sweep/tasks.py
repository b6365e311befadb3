"""Ray tasks of the driver that are retried a few times when their machine runs out of memory.

By default, Ray retries such a task endlessly. The driver disables that (``RAY_task_oom_retries`` in `cluster.quiet`),
counts the attempts, and gives up with one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from mea_ray.core.errors import ClusterError, DeviceOutOfMemory, MeaRayError, OutOfMemory

ATTEMPTS = 3
PAUSE_S = 2.0
"""Seconds before a task is submitted again: other users of the memory may have ended by then."""


@dataclass
class _Task:
    name: str
    what: str
    submit: Callable[[], Any]
    attempts: int = 0
    not_before: float = 0.0


class Tasks:
    """Runs tasks in parallel and yields each when it has ended.

    Args:
        warn: Called with a message when a task is retried.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self._running: dict[Any, _Task] = {}
        self._later: list[_Task] = []

    def add(self, name: str, what: str, submit: Callable[[], Any]) -> None:
        """Submit a task.

        Args:
            name: Its name for the caller.
            what: What it does, for messages, e.g. ``training victim 2d1278fe``.
            submit: Submits it to Ray and returns the reference of its result.
        """
        self._start(_Task(name, what, submit))

    def results(self) -> Iterator[tuple[str, Any, Exception | None]]:
        """Yield each task as it ends: its name, the reference of its result, and its error or None.

        An error of mea_ray is passed on as it is; Ray's error for a task that could not run becomes a `ClusterError`.
        """
        while self._running or self._later:
            yield from self.poll(1.0)

    def poll(self, timeout_s: float) -> list[tuple[str, Any, Exception | None]]:
        """Return the tasks that have ended, as `results` gives them, after waiting at most ``timeout_s``."""
        now = time.monotonic()
        for task in [task for task in self._later if task.not_before <= now]:
            self._later.remove(task)
            self._start(task)
        if not self._running:
            time.sleep(min(0.1, timeout_s))
            return []
        ended = []
        ready, _ = ray.wait(list(self._running), timeout=min(0.5, timeout_s) if self._later else timeout_s)
        for reference in ready:
            task = self._running.pop(reference)
            error = _error_of(reference, task)
            if isinstance(error, (OutOfMemory, DeviceOutOfMemory)) and task.attempts < ATTEMPTS:
                lacks = "machine" if isinstance(error, OutOfMemory) else "GPU"
                self.warn(f"a {lacks} ran out of memory while {task.what}; retrying")
                task.not_before = time.monotonic() + PAUSE_S
                self._later.append(task)
            else:
                ended.append((task.name, reference, error))
        return ended

    def cancel(self) -> None:
        """Cancel the running tasks."""
        for reference in self._running:
            ray.cancel(reference, force=True)
        self._running.clear()
        self._later.clear()

    def _start(self, task: _Task) -> None:
        task.attempts += 1
        self._running[task.submit()] = task


def _error_of(reference: Any, task: _Task) -> Exception | None:
    try:
        # Only the error: a result can be large, and it stays in the object store.
        ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, MeaRayError) else error
    except OutOfMemoryError:
        return OutOfMemory(task.what, task.attempts)
    except RayError as error:
        return ClusterError(f"Ray failed {task.what}: {' '.join(str(error).split())[:300]}")
    return None
