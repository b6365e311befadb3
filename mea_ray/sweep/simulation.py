"""A sweep on a cluster of any size as a simulation of discrete events, driven by the schedule of real sweeps."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mea_ray.sweep.schedule import Node, Schedule

PENDING = 16
"""Maximum number of pending trials, like ``TUNE_MAX_PENDING_TRIALS_PG`` of a real sweep."""


@dataclass(frozen=True)
class Workload:
    """The simulated workload. A slot is the part of the cluster that one trial or one training takes.

    Attributes:
        trials: Trials, each with its service and its models.
        trial_s: Duration of each trial by name.
        model_s: Duration of the training of each model by name.
        start_s: Seconds until a service answers.
        overhead_s: Overhead of a trial in its slot, in seconds: its process, its data, its report.
        service: Slots that one service takes, usually a fraction of one.
    """

    trials: Sequence[Node]
    trial_s: Mapping[str, float]
    model_s: Mapping[str, float]
    start_s: float
    overhead_s: float = 0.0
    service: float = 0.25

    @property
    def work_s(self) -> float:
        """Slot-seconds of all trials and trainings together."""
        return sum(self.trial_s.values()) + sum(self.model_s.values())


@dataclass
class Simulated:
    """Result of a simulation.

    Attributes:
        seconds: Seconds from the start to the end of the last trial.
        first_trial_s: Start of the first trial, in seconds.
        ideal_s: Total work divided by the number of slots of the cluster, in seconds.
        services: Maximum number of services up at once.
        idle: Slot-seconds without a trial or training.
    """

    seconds: float
    first_trial_s: float
    ideal_s: float
    services: int
    idle: float = 0.0

    @property
    def of_ideal(self) -> float:
        """Ideal time divided by the time taken."""
        return self.ideal_s / self.seconds


@dataclass
class _World:
    now: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    count: itertools.count[int] = field(default_factory=itertools.count)

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.count), do))


class Simulation:
    """One run of a workload.

    Args:
        workload: The workload.
        slots: Slots of the cluster.
        services: Maximum number of services up at once; each takes its part of the slots.
    """

    def __init__(self, workload: Workload, slots: int, services: int) -> None:
        self.workload, self.slots, self.services = workload, slots, services
        self.world = _World()
        self.schedule = Schedule(workload.trials, services, int(slots - services * workload.service))
        self.room = services
        self.free = slots - services * workload.service
        self.queue: deque[tuple[str, str]] = deque()  # the queue for slots, first in, first out
        self.up: dict[str, bool] = {}
        self.holders: dict[str, int] = {}
        self.service_of = {trial.name: trial.service for trial in workload.trials}
        self.first_trial_s = -1.0
        self.busy = 0.0

    def run(self) -> Simulated:
        """Run until the last trial has ended."""
        self._look()
        while self.world.events:
            self.world.now, _, do = heapq.heappop(self.world.events)
            do()
            self._look()
        ideal = self.workload.work_s / self.slots
        seconds = self.world.now
        if self.schedule.left or self.schedule.running:
            raise RuntimeError(f"the schedule stopped with {self.schedule.left} trials left")
        return Simulated(seconds, self.first_trial_s, ideal, self.services, seconds * self.slots - self.busy)

    def _look(self) -> None:
        self.queue.extend(("model", name) for name in self.schedule.models_to_train())
        wanted = self.schedule.services_wanted({name: self.holders.get(name, 0) > 0 for name in self.up})
        for name in wanted.stop:
            self.up.pop(name)
        for name in wanted.start:
            self.up[name] = False
            self.world.after(self.workload.start_s, lambda name=name: self._answers(name))  # type: ignore[misc]
        self._give_out()
        room = self.schedule.services_left()
        if room < self.room and len(self.up) <= room:
            self.free += (self.room - room) * self.workload.service
            self.room = room
        while self.queue and self.free >= 1:
            self._begin(*self.queue.popleft())
            self._give_out()

    def _answers(self, service: str) -> None:
        if service in self.up:
            self.up[service] = True

    def _give_out(self) -> None:
        """Request slots for trials that can run, as long as not too many are pending."""
        while sum(kind == "trial" for kind, _ in self.queue) < PENDING:
            name = self.schedule.next_trial([service for service, answers in self.up.items() if answers])
            if name is None:
                return
            service = self.service_of[name]
            self.holders[service] = self.holders.get(service, 0) + 1
            self.queue.append(("trial", name))

    def _begin(self, kind: str, name: str) -> None:
        self.free -= 1
        seconds = self.workload.model_s[name] if kind == "model" else self.workload.trial_s[name]
        self.busy += seconds
        if kind == "trial":
            self.first_trial_s = self.world.now if self.first_trial_s < 0 else self.first_trial_s
            seconds += self.workload.overhead_s
        self.world.after(seconds, lambda: self._end(kind, name))

    def _end(self, kind: str, name: str) -> None:
        self.free += 1
        if kind == "model":
            self.schedule.model_ready(name)
        else:
            self.schedule.ended(name)
            self.holders[self.service_of[name]] -= 1


def workload(
    trials: int,
    victims: int,
    *,
    trial_s: Callable[[int], float],
    victim_s: float,
    null_models: int = 0,
    null_s: float = 0.0,
    start_s: float = 60.0,
    overhead_s: float = 0.0,
    service: float = 0.25,
) -> Workload:
    """Return the workload of a sweep whose trials are spread evenly over its victims.

    Args:
        trials: Total number of trials.
        victims: Distinct victims, each with a service.
        trial_s: Duration of a trial by its number.
        victim_s: Duration of the training of a victim.
        null_models: Number of null models, which all trials share.
        null_s: Duration of the training of one null model.
        start_s: See `Workload`.
        overhead_s: See `Workload`.
        service: See `Workload`.
    """
    nulls = tuple(f"null-{index}" for index in range(null_models))
    nodes = []
    for victim in range(victims):
        mine = range(victim * trials // victims, (victim + 1) * trials // victims)
        nodes += [Node(f"trial-{index}", f"service-{victim}", (f"victim-{victim}", *nulls)) for index in mine]
    durations = {f"trial-{index}": trial_s(index) for index in range(trials)}
    models = {f"victim-{victim}": victim_s for victim in range(victims)} | dict.fromkeys(nulls, null_s)
    return Workload(nodes, durations, models, start_s, overhead_s, service)
