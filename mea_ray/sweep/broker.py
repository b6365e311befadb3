"""Who has which victim service: started when the first trial asks, shared, never more than there is room for.

The broker is a plain class that the runner wraps as a named actor. It owns the services, so they end with it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from mea_ray.config import ExperimentConfig, ServingConfig, SweepConfig, digest, identity
from mea_ray.core.errors import ServiceUnavailable
from mea_ray.experiment.artifacts import Artifact
from mea_ray.storage.remote import Storage
from mea_ray.sweep import cluster
from mea_ray.sweep.events import ServiceStarted, Warned

HOLDER_EXPIRY_S = 90.0
_START_ATTEMPTS, _START_PAUSE_S = 5, 3.0


@dataclass(frozen=True)
class ServiceSpec:
    """A victim and the settings of its service; trials with equal specs share one.

    Attributes:
        victim: Name of the victim artifact.
        folder: Its folder, or where every node fetches it from.
        settings: The ``service`` section without the client's part.
    """

    victim: str
    folder: str | Artifact
    settings: ServingConfig

    @classmethod
    def of(cls, config: ExperimentConfig, victim: str, storage: Storage) -> ServiceSpec:
        """Return the spec of an experiment whose victim is in a storage."""
        if storage.remote is None:
            folder: str | Artifact = str(storage.root / "artifacts" / "victims" / victim)
        else:
            folder = Artifact(storage.location, "victims", victim)
        return cls(victim, folder, config.service.serving)

    @property
    def key(self) -> str:
        """Name of the service, the same for equal specs."""
        return digest({"victim": self.victim, "settings": identity(self.settings)})


class Entry(NamedTuple):
    """The way into a running service: its name, and the secret that its owner shows."""

    name: str
    secret: str


@dataclass
class _Slot:
    service: Any
    name: str
    holders: set[str] = field(default_factory=set)
    used: float = field(default_factory=time.monotonic)


class Broker:
    """Starts, shares and stops victim services.

    A trial holds its service until it releases it, its driver releases it, or it has sent no heartbeat for
    ``HOLDER_EXPIRY_S``. A service that nobody holds stays up until its room is needed.

    Args:
        prefix: Of the services' names; unique for the sweep.
        ledgers: Folder of the services' ledgers.
        max_services: Services up at once.
        placement_group: Where they run; anywhere when None.
        start: ``VictimService.start``, or what stands for it in a test.
        on_event: Called when a service starts, and when one of its actors dies.
        be_patient: Called first, in the process of the broker: it says how long to wait for the storage.
    """

    def __init__(
        self,
        prefix: str,
        ledgers: str,
        max_services: int,
        placement_group: Any = None,
        start: Callable[..., Any] | None = None,
        on_event: Callable[[Any], None] | None = None,
        be_patient: Callable[[], None] = lambda: None,
    ) -> None:
        be_patient()
        self.prefix, self.ledgers, self.max_services = prefix, ledgers, max_services
        self._group, self._start, self._on_event = placement_group, start, on_event
        self._slots: dict[str, _Slot] = {}
        self._last_beat: dict[str, float] = {}
        self._failed_starts: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def acquire(self, trial: str, spec: ServiceSpec, broken: str | None = None) -> Entry | None:
        """Give a trial its service; asking again changes nothing.

        Args:
            trial: Name of the trial.
            spec: The service that it needs.
            broken: Name of a service that did not answer this trial; it is replaced.

        Returns:
            The running service; None if there is no room yet: ask again.

        Raises:
            ArtifactError: The victim's folder is damaged.
            ServiceUnavailable: The service could not be started.
        """
        self._last_beat[trial] = time.monotonic()
        with self._lock:
            self._forget_silent()
            for key, other in self._slots.items():
                if key != spec.key:
                    other.holders.discard(trial)
            slot = self._slots.get(spec.key)
            if slot is not None and broken is not None and slot.name == broken:
                self._stop(spec.key)
                slot = None
            if slot is None:
                slot = self._started(spec)
            if slot is None:
                return None
            slot.holders.add(trial)
            slot.used = time.monotonic()
            return Entry(slot.name, slot.service.secret)

    def prepare(self, spec: ServiceSpec) -> None:
        """Start a service that will be asked for, while the trials that will ask are starting themselves."""
        name = f"prepare-{spec.key}"
        self.acquire(name, spec)
        self.release(name)

    def beat(self, trial: str) -> None:
        """Note that a trial is alive."""
        self._last_beat[trial] = time.monotonic()

    def release(self, trial: str) -> None:
        """Take a trial off its service, if it has one."""
        with self._lock:
            for slot in self._slots.values():
                slot.holders.discard(trial)
            self._last_beat.pop(trial, None)

    def holders(self) -> dict[str, list[str]]:
        """Return who holds which running service, by the service's name."""
        with self._lock:
            return {slot.name: sorted(slot.holders) for slot in self._slots.values()}

    def stop(self) -> None:
        """Stop all services."""
        with self._lock:
            for key in list(self._slots):
                self._stop(key)

    def _forget_silent(self) -> None:
        now = time.monotonic()
        for slot in self._slots.values():
            slot.holders -= {t for t in slot.holders if now - self._last_beat.get(t, 0.0) > HOLDER_EXPIRY_S}

    def _make_room(self) -> bool:
        if len(self._slots) < self.max_services:
            return True
        idle = [key for key, slot in self._slots.items() if not slot.holders]
        if not idle:
            return False
        self._stop(min(idle, key=lambda key: self._slots[key].used))
        return True

    def _started(self, spec: ServiceSpec) -> _Slot | None:
        """Start a service; None if there is no room, or if it failed and will be tried again.

        A start can fail for a while: the processes of a driver that was killed may still hold the ledger open.
        """
        attempts, pause_until = self._failed_starts.get(spec.key, (0, 0.0))
        if time.monotonic() < pause_until or not self._make_room():
            return None
        start = self._start
        if start is None:
            from mea_ray.service.pool import VictimService

            start = VictimService.start
        name = f"{self.prefix}-{spec.key}-{uuid.uuid4().hex[:6]}"
        try:
            service = start(
                spec.folder,
                name,
                spec.settings,
                ledger_path=f"{self.ledgers}/{spec.key}.sqlite",
                placement_group=self._group,
            )
        except ServiceUnavailable:
            self._failed_starts[spec.key] = (attempts + 1, time.monotonic() + _START_PAUSE_S)
            if attempts + 1 >= _START_ATTEMPTS:
                del self._failed_starts[spec.key]
                raise
            return None
        self._failed_starts.pop(spec.key, None)
        if self._on_event is not None:
            self._on_event(ServiceStarted(name, spec.victim))
            emit = self._on_event
            service.watch(lambda text: emit(Warned(f"service of victim {spec.victim[:8]}: {text}")))
        slot = self._slots[spec.key] = _Slot(service, name)
        return slot

    def _stop(self, key: str) -> None:
        self._slots.pop(key).service.stop()


class Hold:
    """A trial's hold on its service: waits for it, says "alive" while it is held, releases it.

    Args:
        broker: Handle of the broker actor.
        trial: Name of the trial.
        spec: The service that it needs.
        answers: Whether a service answers; one that does not is replaced.
        pulse: Called at every heartbeat, in the heartbeat's thread.
        beat_s: Seconds between heartbeats.
    """

    def __init__(
        self,
        broker: Any,
        trial: str,
        spec: ServiceSpec,
        *,
        answers: Callable[[Entry], bool] = lambda entry: True,
        pulse: Callable[[], None] = lambda: None,
        beat_s: float = 1.0,
    ) -> None:
        self.broker, self.trial, self.spec = broker, trial, spec
        self.answers, self.pulse, self.beat_s = answers, pulse, beat_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"hold-{trial}", daemon=True)

    def __enter__(self) -> Entry:
        entry = self._acquire()
        self._thread.start()
        return entry

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.pulse()
        self.broker.release.remote(self.trial)

    def _acquire(self) -> Entry:
        broken: str | None = None
        while True:
            entry: Entry | None = ask(self.broker.acquire.remote(self.trial, self.spec, broken))
            if entry is not None and self.answers(entry):
                return entry
            broken = None if entry is None else entry.name
            time.sleep(0.3)

    def _beat(self) -> None:
        while not self._done.wait(self.beat_s):
            self.broker.beat.remote(self.trial)
            self.pulse()


def ask(reference: Any) -> Any:
    """Wait for the broker's answer; an error of ours is raised as itself, not wrapped in Ray's.

    Raises:
        ServiceUnavailable: The broker does not answer.
    """
    from mea_ray.service.naming import answer_of

    return answer_of("the broker of the victim services", reference)


def needs(configs: list[ExperimentConfig], max_services: int) -> tuple[int, dict[str, float], int]:
    """Return what the services need at most.

    Args:
        configs: Experiments that will be served.
        max_services: Services up at once.

    Returns:
        Services up at once, resources of one replica (the largest of each kind), replicas of one service.
    """
    specs: set[str] = set()
    cpus = gpus = 0.0
    replicas = 1
    for config in configs:
        if config.thief.blackbox is not None:  # somebody else runs the service
            continue
        served = config.service.serving
        specs.add(digest([identity(part) for part in (config.data, config.victim, served)]))
        cpus, gpus = max(cpus, served.cpus_per_replica), max(gpus, served.gpus_per_replica)
        replicas = max(replicas, served.replicas)
    bundle = {key: value for key, value in {"CPU": cpus, "GPU": gpus}.items() if value > 0}
    return min(max_services, len(specs)), bundle, replicas


def demand_of(sweep: SweepConfig, configs: list[ExperimentConfig]) -> cluster.Demand:
    """Return what the experiments need of the cluster."""
    services, replica, replicas = needs(configs, sweep.max_services)
    if sweep.search.adaptive and any(path.startswith(("victim.", "data.", "service.")) for path in sweep.space):
        services = sweep.max_services
    reserved = sweep.base.resources
    return cluster.Demand(services, replica, replicas, reserved.trial, reserved.victim, reserved.placement)
