"""A sweep in the metrics of Ray, for Prometheus and the dashboard: queries a second, budget left, and the slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mea_ray.sweep import events

WINDOW_S = 15.0
"""Queries a second are the mean over so many seconds."""
SLOT_STATES = ("busy", "waiting for models", "waiting for a service", "free", "no trial left")


class SweepMetrics:
    """Follows the events of a sweep and sets gauges of Ray; the sweep's name is their tag ``sweep``.

    ======================================  ==========================================================================
    ``mea_ray_queries_per_second``          images that all thieves were answered a second
    ``mea_ray_budget_left``                 images that the trials under way may still ask
    ``mea_ray_trials``                      trials by ``state``: ``running``, ``finished``, ``failed``
    ``mea_ray_slots``                       slots by ``state``: ``busy``, or why nothing runs in them
    ======================================  ==========================================================================

    Args:
        sweep: The sweep's name.
        gauge: Makes a gauge, as ``ray.util.metrics.Gauge`` does.
        clock: Seconds that only rise.
    """

    def __init__(self, sweep: str, gauge: Callable[..., Any], clock: Callable[[], float] = time.monotonic) -> None:
        def make(name: str, description: str, *tags: str) -> Any:
            made = gauge(f"mea_ray_{name}", description=description, tag_keys=("sweep", *tags))
            return made.set_default_tags({"sweep": sweep})

        self._rate = make("queries_per_second", "Images that all thieves were answered a second.")
        self._left = make("budget_left", "Images that the trials under way may still ask.")
        self._trials = make("trials", "Trials by state.", "state")
        self._slots = make("slots", "Slots by state: busy, or why nothing runs in them.", "state")
        self._clock, self._lock = clock, threading.Lock()
        self._answers: dict[str, tuple[int, int]] = {}
        self._counts = {"running": 0, "finished": 0, "failed": 0}
        self._running: set[str] = set()
        self._asked: deque[tuple[float, int]] = deque()

    def follow(self, event: events.Event) -> None:
        """Take an event of the sweep."""
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
        # The first number of a process counts what earlier ones were answered.
        before = self._answers.get(event.trial, (event.answers, 0))[0]
        self._answers[event.trial] = event.answers, event.budget
        self._asked.append((self._clock(), max(0, event.answers - before)))

    def update(self) -> None:
        """Set the gauges; the rate falls while nobody asks."""
        with self._lock:
            now = self._clock()
            while self._asked and self._asked[0][0] < now - WINDOW_S:
                self._asked.popleft()
            self._rate.set(sum(count for _, count in self._asked) / WINDOW_S)
            self._left.set(sum(max(0, budget - answers) for answers, budget in self._answers.values()))
            for state, count in self._counts.items():
                self._trials.set(count, tags={"state": state})

    def slots(self, states: Mapping[str, int]) -> None:
        """Set what the slots do; of ``SLOT_STATES``, those that are missing are 0."""
        for state in SLOT_STATES:
            self._slots.set(states.get(state, 0), tags={"state": state})
