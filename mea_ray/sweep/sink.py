"""Carries events from every process of a sweep to the driver. Imports little: the sink is a separate process."""

from __future__ import annotations

from typing import Any

from mea_ray.service.naming import NAMESPACE
from mea_ray.sweep.events import Event


class EventSink:
    """An actor that carries events from all processes to the driver; it keeps the newest ``limit`` of them."""

    def __init__(self, limit: int = 10_000) -> None:
        self.limit = limit
        self._events: list[Event] = []

    def push(self, event: Event) -> None:
        """Take an event."""
        self._events.append(event)
        del self._events[: -self.limit]

    def drain(self) -> list[Event]:
        """Return all events since the last call, in order."""
        taken, self._events = self._events, []
        return taken


class SinkSender:
    """Sends events to the named sink without waiting; a lost event is not an error. Picklable."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._sink: Any = None

    def __call__(self, event: Event) -> None:
        """Send an event."""
        import ray

        try:
            if self._sink is None:
                self._sink = ray.get_actor(self.name, namespace=NAMESPACE)
            self._sink.push.remote(event)
        except (ValueError, ray.exceptions.RayError):
            return

    def __reduce__(self) -> tuple[Any, ...]:
        return SinkSender, (self.name,)
