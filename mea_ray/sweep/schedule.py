"""Decides which models, services and trials are next: a sweep as a graph, independent of Ray and time.

A trial needs its models and, for as long as it runs, the service of its victim. It is given out only when all of them
are ready, so that nothing waits in a slot. Services are few: each is up as long as trials of its victim are left, and
is then replaced by the next. The sweep's driver and the simulation of `bench scheduling` follow the same schedule.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Node:
    """A trial in the graph.

    Attributes:
        name: Its name.
        service: Name of the service that it queries; empty if someone else runs it.
        models: Names of the models that must be ready first.
    """

    name: str
    service: str
    models: tuple[str, ...]


class Services(NamedTuple):
    """Services to start, most urgent first, and services to stop."""

    start: list[str]
    stop: list[str]


class Schedule:
    """The state of a sweep's graph. Safe for several threads.

    Args:
        trials: The trials, grouped by service.
        services: Maximum number of services up at once.
        slots: Maximum number of concurrent trials.
        models: Names of the models that have to be made; the others exist. None for all.
        trainings: Maximum number of concurrent trainings; None means ``slots``.
        grows: Whether trials are added while the sweep runs. A service then stays up until another needs its resources,
            since its next trial may not be known yet.
    """

    def __init__(
        self,
        trials: Sequence[Node],
        services: int,
        slots: int,
        models: Collection[str] | None = None,
        trainings: int | None = None,
        grows: bool = False,
    ) -> None:
        self.services, self.slots, self.grows = services, max(1, slots), grows
        self.trainings = max(1, self.slots if trainings is None else trainings)
        self._lock = threading.RLock()
        self._waiting: dict[str, dict[str, Node]] = {}
        self._running: dict[str, Node] = {}
        wanted = dict.fromkeys(name for trial in trials for name in trial.models)
        self._absent = {name: True for name in wanted if models is None or name in models}
        self._to_train = list(self._absent)  # grouped by victim, like the trials
        self._training: set[str] = set()
        self._made: set[str] = set()
        for trial in trials:
            self._waiting.setdefault(trial.service, {})[trial.name] = trial

    @property
    def left(self) -> int:
        """Trials that were not given out yet."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    @property
    def absent(self) -> int:
        """Number of missing models that some trial still needs."""
        with self._lock:
            needed = {name for trial in self._trials() for name in trial.models}
            return len(needed & self._absent.keys()) + len(self._training - needed)

    @property
    def running(self) -> int:
        """Trials that were given out and have not ended."""
        with self._lock:
            return len(self._running)

    def models_to_train(self) -> list[str]:
        """Return the models whose training is to be submitted now; from then on they count as being trained.

        As many as fit at once, so that they share the slots with trials that are ready: without models trained ahead
        the slots would be idle later, and with all of them ahead the first trial would wait for the last model.
        """
        with self._lock:
            count = max(0, self.trainings - len(self._training))
            chosen, self._to_train = self._to_train[:count], self._to_train[count:]
            self._training.update(chosen)
            return chosen

    def model_ready(self, name: str) -> None:
        """Register that a model is ready."""
        with self._lock:
            self._training.discard(name)
            self._absent.pop(name, None)
            self._made.add(name)

    def add(self, trial: Node) -> None:
        """Add a trial."""
        with self._lock:
            for name in trial.models:
                if name not in self._made:
                    self._absent[name] = True
                    if name not in self._training and name not in self._to_train:
                        self._to_train.append(name)
            self._waiting.setdefault(trial.service, {})[trial.name] = trial

    def forget(self) -> None:
        """Remove all trials; models and running trainings remain."""
        with self._lock:
            self._waiting.clear()
            self._running.clear()
            self._to_train = []

    def model_lost(self, name: str) -> list[str]:
        """Remove the trials that need a model that cannot be made; return their names."""
        with self._lock:
            self._training.discard(name)
            lost = [trial.name for trial in self._trials() if name in trial.models]
            self.give_up(lost)
            return lost

    def service_lost(self, service: str) -> list[str]:
        """Remove the trials that need a service that cannot be started; return their names."""
        with self._lock:
            lost = list(self._waiting.get(service, {}))
            self.give_up(lost)
            return lost

    def give_up(self, trials: Iterable[str]) -> None:
        """Remove trials that were not given out yet."""
        with self._lock:
            for name in list(trials):
                for group in self._waiting.values():
                    group.pop(name, None)
            still = {name for trial in self._trials() for name in trial.models}
            self._to_train = [name for name in self._to_train if name in still]

    def next_trial(self, up: Collection[str]) -> str | None:
        """Give out a trial whose models and service are ready; None if there is none at the moment.

        Args:
            up: Services that answer.
        """
        with self._lock:
            running = Counter(trial.service for trial in self._running.values())
            candidates: list[tuple[int, int, int, Node]] = []
            for service, group in self._waiting.items():
                if service and service not in up:
                    continue
                trial = next((each for each in group.values() if self._is_ready(each)), None)
                if trial is not None:
                    # The service with most trials left, so that all end together and none is left to a few trials
                    # while slots are idle; among equal ones, the one with fewer running trials.
                    candidates.append((-len(group), running[service], len(candidates), trial))
            if not candidates:
                return None
            trial = min(candidates)[-1]
            del self._waiting[trial.service][trial.name]
            self._running[trial.name] = trial
            return trial.name

    def again(self, trials: Collection[str]) -> None:
        """Take back trials that were given out and have not ended, because Tune stopped."""
        with self._lock:
            for name in [name for name in self._running if name in trials]:
                node = self._running.pop(name)
                self._waiting.setdefault(node.service, {})[name] = node

    def ended(self, trial: str) -> None:
        """Register the end of a trial that was given out."""
        with self._lock:
            self._running.pop(trial, None)

    def services_wanted(self, known: Mapping[str, bool]) -> Services:
        """Return which services to start and to stop.

        Args:
            known: Services that are up or being started, and whether trials hold them.
        """
        with self._lock:
            asked = {trial.service for trial in self._running.values()}
            busy = {name for name, is_busy in known.items() if is_busy or name in asked}
            ready = {
                name: sum(map(self._is_ready, group.values()))
                for name, group in self._waiting.items()
                if name and any(map(self._is_ready, group.values()))
            }
            done = [name for name in known if name not in busy and self._is_done(name)]
            room = self.services - (len(known) - len(done))
            absent = sorted((name for name in ready if name not in known), key=lambda name: -ready[name])
            start = absent[: max(0, room)]
            # One whose trials wait for models is replaced by one whose trials can run.
            idle = [name for name in known if name not in busy and name not in done and name not in ready]
            return Services(start, [*done, *idle[: max(0, len(absent) - len(start))]])

    def _is_done(self, service: str) -> bool:
        return not self.grows and not self._waiting.get(service)

    def services_left(self) -> int:
        """Return the maximum number of services still needed at once."""
        with self._lock:
            if self.grows:
                return self.services
            left = {name for name, group in self._waiting.items() if name and group}
            return min(self.services, len(left | {t.service for t in self._running.values() if t.service}))

    def reason(self, up: Collection[str]) -> str:
        """Return a short reason why no trial is given out."""
        with self._lock:
            waiting = self._trials()
            if not waiting:
                return "no trial is left"
            ready = [trial for trial in waiting if self._is_ready(trial)]
            if not ready:
                return f"{len(waiting)} trials wait for {len(self._absent)} models"
            return f"{len(ready)} trials wait for a service ({len(up)} of {self.services} are up)"

    def slot_states(self, up: Collection[str]) -> dict[str, int]:
        """Return the number of slots by state: ``busy``, or why idle; see ``metrics.SLOT_STATES``.

        A slot for which a trial is ready counts as ``free``: it is about to be filled.

        Args:
            up: Services that answer.
        """
        with self._lock:
            waiting = self._trials()
            ready = [trial for trial in waiting if self._is_ready(trial)]
            could = sum(not trial.service or trial.service in up for trial in ready)
            left = max(0, self.slots - len(self._running))
            states = {"busy": len(self._running)}
            reasons = {"free": could, "waiting for a service": len(ready) - could}
            reasons["waiting for models"] = len(waiting) - len(ready)
            for state, count in reasons.items():
                states[state] = min(left, count)
                left -= states[state]
            return {**states, "no trial left": left}

    def _trials(self) -> list[Node]:
        return [trial for group in self._waiting.values() for trial in group.values()]

    def _is_ready(self, trial: Node) -> bool:
        return not any(name in self._absent for name in trial.models)


def best_services(victims: int, trials: int, services_that_fit: int, slots: Mapping[int, int]) -> int:
    """Return the number of services up at once with which most trials run: ``max_services: auto``.

    While the last trials of a victim run, its service gets no new ones; so two services are assumed to fill as many
    slots as one victim has trials. With few trials per victim this gives more services, each of which takes resources
    from the trials.

    Args:
        victims: Distinct services that the sweep needs over time.
        trials: Total number of trials.
        services_that_fit: Number of services that fit beside one trial.
        slots: Number of concurrent trials as a function of the number of services.
    """
    most = max(1, min(victims, services_that_fit))
    each = max(1.0, trials / max(1, victims))

    def busy(count: int) -> float:
        return min(slots[count], count * each if count == victims else count * each / 2)

    return max(range(1, most + 1), key=lambda count: (busy(count), -count))
