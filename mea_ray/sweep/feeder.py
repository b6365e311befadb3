"""Keeps a sweep's slots busy: a thread of the driver that trains models and starts services as they are needed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from mea_ray.core.errors import MeaRayError
from mea_ray.sweep.broker import ServiceSpec, ServiceState, ask
from mea_ray.sweep.schedule import Node, Schedule
from mea_ray.sweep.tasks import Tasks

logger = logging.getLogger(__name__)

EVERY_S = 0.5
SAY_AFTER_S = 60.0


class Feeder:
    """Follows a `Schedule`; a thread works while the block of `feeding` runs.

    Args:
        schedule: The sweep's graph.
        specs: The services by key.
        train: Submits the training of a model.
        tasks: Runs the trainings.
        fail: Called with the name of a trial that cannot run, and the reason.
        notify: Called with a message when slots stay idle.
        on_slots: Called after each step with the states of the slots, see `Schedule.slot_states`.
    """

    def __init__(
        self,
        schedule: Schedule,
        specs: Mapping[str, ServiceSpec],
        train: Callable[[str], None],
        tasks: Tasks,
        fail: Callable[[str, str], None],
        notify: Callable[[str], None],
        on_slots: Callable[[Mapping[str, int]], None] = lambda states: None,
    ) -> None:
        self.schedule, self.specs = schedule, dict(specs)
        self.broker: Any = None
        self.train, self.tasks, self.fail, self.notify = train, tasks, fail, notify
        self.on_slots = on_slots
        self._up: set[str] = set()
        self._idle_since: float | None = None
        self._losing = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="feeder", daemon=True)

    def add(self, trial: Node, spec: ServiceSpec | None = None) -> None:
        """Add a trial and its service to a growing schedule."""
        if spec is not None:
            self.specs.setdefault(spec.key, spec)
        self.schedule.add(trial)

    @contextlib.contextmanager
    def feeding(self, broker: Any) -> Iterator[None]:
        """Train models, and start services through a broker, given by its handle, while the block runs."""
        self.broker = broker
        self._thread.start()
        try:
            yield
        finally:
            self._done.set()
            self._thread.join(30)
            self.tasks.cancel()

    @property
    def left(self) -> int:
        """Number of trials that were not given out yet; at least 1 while some are being marked as failed."""
        return self.schedule.left or int(self._losing)

    def next_trial(self) -> str | None:
        """Give out a trial that can run now; None if there is none at the moment."""
        name = self.schedule.next_trial(self._up)
        self._idle_since = None if name is not None else self._idle_since
        return name

    def ended(self, trial: str) -> None:
        """Note that a trial has ended."""
        self.schedule.ended(trial)

    def step(self) -> None:
        """Check models and services once, and start what is next."""
        self._look_at_models()
        state: dict[str, ServiceState] = ask(self.broker.state.remote())
        self._up = {key for key, each in state.items() if each.up}
        wanted = self.schedule.services_wanted({key: each.holders > 0 for key, each in state.items()})
        for key in wanted.stop:
            ask(self.broker.close.remote(key))
        for key in wanted.start:
            try:
                ask(self.broker.prepare.remote(self.specs[key]))
            except MeaRayError as error:
                self._lose(partial(self.schedule.service_lost, key), f"{type(error).__name__}: {error}")
        self._give_back()
        self._say_why_idle()
        self.on_slots(self.schedule.slot_states(self._up))

    def train_all(self) -> None:
        """Train all models and wait, for a cluster without room for a training beside the services.

        Raises:
            KeyboardInterrupt: Ctrl-C; all trainings were cancelled.
        """
        try:
            while self.schedule.absent:
                self._look_at_models()
        except BaseException:
            self.tasks.cancel()
            raise

    def _look_at_models(self) -> None:
        for name in self.schedule.models_to_train():
            self.train(name)
        for name, _, error in self.tasks.poll(EVERY_S):
            if error is None:
                self.schedule.model_ready(name)
            else:  # a failed model must not affect the trials of others
                reason = f"model {name} could not be trained: {type(error).__name__}: {error}"
                self._lose(partial(self.schedule.model_lost, name), reason)

    def _lose(self, take_out: Callable[[], list[str]], reason: str) -> None:
        """Mark trials as failed; until all are marked, Tune must not consider the sweep finished."""
        self._losing = True
        for trial in take_out():
            self.fail(trial, reason)
        self._losing = False

    def _give_back(self) -> None:
        """Release the resources of services that are no longer needed to the trials."""
        from ray.util.placement_group import remove_placement_group

        for group in ask(self.broker.shrink.remote(self.schedule.services_left())):
            with contextlib.suppress(Exception):  # the cluster may be gone already
                remove_placement_group(group)

    def _say_why_idle(self) -> None:
        if self.schedule.running or not self.left:
            self._idle_since = None
            return
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > SAY_AFTER_S:
            self._idle_since = float("inf")  # once
            self.notify(f"no trial runs: {self.schedule.reason(self._up)}")

    def _work(self) -> None:
        while not self._done.is_set():
            try:
                self.step()
            except Exception as error:  # from Ray, which reports it itself if it matters; the next step may succeed
                if not self._done.is_set():
                    logger.warning("the sweep's models and services could not be checked: %s", error)
            self._done.wait(EVERY_S)
