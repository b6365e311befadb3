"""A sweep's metrics in Ray, for Prometheus and the dashboard: queries per second, remaining budget, slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mea_ray.sweep import events

WINDOW_S = 15.0
"""Averaging window of queries per second, in seconds."""
SLOT_STATES = ("busy", "waiting for models", "waiting for a service", "free", "no trial left")


class SweepMetrics:
    """Follows the events of a sweep and sets gauges of Ray, tagged ``sweep`` with the sweep's name.

    ======================================  ==========================================================================
    ``mea_ray_queries_per_second``          images answered per second, over all thieves
    ``mea_ray_budget_left``                 remaining budget of the running trials, in images
    ``mea_ray_trials``                      trials by ``state``: ``running``, ``finished``, ``failed``
    ``mea_ray_slots``                       slots by ``state``: ``busy``, or the reason why they are idle
    ======================================  ==========================================================================

    Args:
        sweep: The sweep's name.
        gauge: Makes a gauge, like ``ray.util.metrics.Gauge``.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, sweep: str, gauge: Callable[..., Any], clock: Callable[[], float] = time.monotonic) -> None:
        def make(name: str, description: str, *tags: str) -> Any:
            made = gauge(f"mea_ray_{name}", description=description, tag_keys=("sweep", *tags))
            return made.set_default_tags({"sweep": sweep})

        self._rate = make("queries_per_second", "Images answered per second, over all thieves.")
        self._left = make("budget_left", "Remaining budget of the running trials, in images.")
        self._trials = make("trials", "Trials by state.", "state")
        self._slots = make("slots", "Slots by state: busy, or the reason why they are idle.", "state")
        self._clock, self._lock = clock, threading.Lock()
        self._answers: dict[str, tuple[int, int]] = {}
        self._counts = {"running": 0, "finished": 0, "failed": 0}
        self._running: set[str] = set()
        self._asked: deque[tuple[float, int]] = deque()

    def follow(self, event: events.Event) -> None:
        """Process an event of the sweep."""
        with self._lock:
            if isinstance(event, events.Queried):
                self._queried(event)
            elif isinstance(event, events.TrialStarted):
                self._running.add(event.trial)
            elif isinstance(event, (events.TrialFinished, events.TrialFailed)):
                self._running.discard(event.trial)
                self._answers.pop(event.trial, None)
                self._counts["failed" if isinstance(event, events.TrialFailed) else "finished"] += 1
            else:
                return
            self._counts["running"] = len(self._running)
        self.update()

    def _queried(self, event: events.Queried) -> None:
        # The first number of a process includes the answers of earlier ones.
        before = self._answers.get(event.trial, (event.answers, 0))[0]
        self._answers[event.trial] = event.answers, event.budget
        self._asked.append((self._clock(), max(0, event.answers - before)))

    def update(self) -> None:
        """Set the gauges; the rate falls while there are no queries."""
        with self._lock:
            now = self._clock()
            while self._asked and self._asked[0][0] < now - WINDOW_S:
                self._asked.popleft()
            self._rate.set(sum(count for _, count in self._asked) / WINDOW_S)
            self._left.set(sum(max(0, budget - answers) for answers, budget in self._answers.values()))
            for state, count in self._counts.items():
                self._trials.set(count, tags={"state": state})

    def slots(self, states: Mapping[str, int]) -> None:
        """Set the number of slots by state; missing ``SLOT_STATES`` are 0."""
        for state in SLOT_STATES:
            self._slots.set(states.get(state, 0), tags={"state": state})
