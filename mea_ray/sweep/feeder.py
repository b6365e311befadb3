"""Keeps a sweep's slots fed: a thread of the driver that has models trained and services started as they are needed."""

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
        fail: Called with the name and the reason of a trial that cannot run.
        notify: Called with a sentence when slots stay idle.
        on_slots: Called after each look with what the slots do, see `Schedule.slot_states`.
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
        """Add a trial to a schedule that grows, and the service that it asks."""
        if spec is not None:
            self.specs.setdefault(spec.key, spec)
        self.schedule.add(trial)

    @contextlib.contextmanager
    def feeding(self, broker: Any) -> Iterator[None]:
        """Have models trained and services started by a broker, whose handle this is, while the block runs."""
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
        """Trials that were not given out yet; at least 1 while some are being given up, which takes a moment."""
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
        """Look once at models and services, and do what is next."""
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
        """Have all models trained, and wait: for a cluster that has no room for a training beside the services.

        Raises:
            KeyboardInterrupt: Ctrl-C; no training is under way any more.
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
            else:  # whatever broke one model must not break the trials of others
                reason = f"model {name} could not be trained: {type(error).__name__}: {error}"
                self._lose(partial(self.schedule.model_lost, name), reason)

    def _lose(self, take_out: Callable[[], list[str]], reason: str) -> None:
        """Give trials up; until all of them count as failed, Tune must not take the sweep for finished."""
        self._losing = True
        for trial in take_out():
            self.fail(trial, reason)
        self._losing = False

    def _give_back(self) -> None:
        """Give the room of services that are not needed any more to the trials."""
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
            except Exception as error:  # of Ray, which says so itself where it matters; the next look may succeed
                if not self._done.is_set():
                    logger.warning("the sweep's models and services could not be looked after: %s", error)
            self._done.wait(EVERY_S)
