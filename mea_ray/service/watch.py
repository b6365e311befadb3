"""Reports when an actor of a service died and is up again, or stays down: its clients only notice a delay."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

AWAY_S = 15.0
"""Seconds after which an actor that does not answer is reported as down."""


class Watch:
    """Polls the actors of a service in a thread, until it is stopped.

    Args:
        actors: Handles by name for messages, each with a method ``incarnation`` whose result names the node and changes
            with a restart.
        notify: Called with a message, without the service's name: ``replica 0 died and is up again (on node ...)``.
        every_s: Polling interval, and timeout of an answer, in seconds.
    """

    def __init__(self, actors: dict[str, Any], notify: Callable[[str], None], every_s: float = 2.0) -> None:
        self.actors, self.notify, self.every_s = actors, notify, every_s
        self._known: dict[str, str] = {}
        self._silent: dict[str, float] = {}
        self._reported_away: set[str] = set()
        self._stop = threading.Event()
        self._try_to_look()  # before the first request, so that no death goes unnoticed
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, before the actors are stopped on purpose."""
        self._stop.set()
        self._thread.join(2 * self.every_s)

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self._try_to_look()

    def _try_to_look(self) -> None:
        with contextlib.suppress(Exception):  # watching must not cause a failure
            self.look()

    def look(self) -> None:
        """Ask once."""
        asked = {handle.incarnation.remote(): name for name, handle in self.actors.items()}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=self.every_s)
        for reference, name in asked.items():
            answer = None
            if reference in ready:
                with contextlib.suppress(ray.exceptions.RayError):
                    answer = ray.get(reference)
            if not self._stop.is_set():
                self._note(name, answer)

    def _note(self, name: str, incarnation: str | None) -> None:
        now = time.monotonic()
        if incarnation is None:
            since = self._silent.setdefault(name, now)
            if now - since > AWAY_S and name not in self._reported_away:
                self._reported_away.add(name)
                self.notify(f"{name} has been down for {now - since:.0f} s; its clients wait")
            return
        self._silent.pop(name, None)
        self._reported_away.discard(name)
        if self._known.setdefault(name, incarnation) != incarnation:
            self._known[name] = incarnation
            where = incarnation.partition(" ")[0]
            self.notify(
                f"{name} died and is up again on node {where}: its requests in flight are repeated and charged once"
            )


def incarnation() -> str:
    """Return an id that changes with a restart of this actor: ``<node> <process>``."""
    return f"{ray.get_runtime_context().get_node_id()[:8]} {os.getpid()}"
