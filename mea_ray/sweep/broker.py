"""Assigns victim services to trials: started for the first trial, shared, never more than there is room for.

The broker is a plain class that the runner wraps in an actor. It owns the services, so they end with it.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mea_ray.config import ExperimentConfig, ServingConfig, SweepConfig, digest, identity
from mea_ray.core.errors import ArtifactError, ConfigError, MeaRayError, ServiceUnavailable
from mea_ray.experiment.artifacts import Artifact
from mea_ray.storage.remote import Storage
from mea_ray.sweep import cluster
from mea_ray.sweep.events import ServiceStarted, Warned

logger = logging.getLogger(__name__)

HOLDER_EXPIRY_S = 90.0
LEDGER_COPY_S = 30.0
"""Seconds between two copies of a ledger to remote storage."""
_START_ATTEMPTS, _START_PAUSE_S = 5, 3.0
_EXPECTED = (ServiceUnavailable, ArtifactError, ConfigError)


@dataclass(frozen=True)
class ServiceSpec:
    """A victim and the settings of its service; trials with equal specs share one.

    Attributes:
        victim: Name of the victim artifact.
        folder: Its folder, or where every node downloads it from.
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
        """Name of the service, equal for equal specs."""
        return digest({"victim": self.victim, "settings": identity(self.settings)})


class Entry(NamedTuple):
    """Access to a running service: its name, and its owner's secret."""

    name: str
    secret: str


@dataclass
class _Slot:
    """A service that is up, or being started (then ``service`` is None)."""

    spec: ServiceSpec
    name: str
    group: Any
    service: Any = None
    holders: set[str] = field(default_factory=set)
    used: float = field(default_factory=time.monotonic)
    touched: bool = False  # there may be charges since its ledger was last copied


@dataclass
class _Failed:
    """Consecutive failed starts of a service; after too many, ``error`` is raised to the next caller."""

    attempts: int = 0
    pause_until: float = 0.0
    error: ServiceUnavailable | ArtifactError | ConfigError | None = None


@dataclass(frozen=True)
class ServiceState:
    """The state of a service.

    Attributes:
        up: Whether it answers; False while it is being started.
        holders: Number of trials that hold it.
    """

    up: bool
    holders: int


class Broker:
    """Starts, shares and stops victim services.

    A trial holds its service until it releases it, its driver releases it, or it has sent no heartbeat for
    ``HOLDER_EXPIRY_S``. A service that nobody holds stays up until its room is needed, or the driver closes it.

    Services are started and stopped in separate threads, several at the same time. No call waits for them: a trial
    whose service is being started has to ask again, and heartbeats count immediately.

    Args:
        prefix: Prefix of the services' names; unique for the sweep.
        ledgers: Folder of the services' ledgers.
        max_services: Maximum number of services up at once.
        placement_groups: One placement group per service; None lets Ray choose.
        start: ``VictimService.start``, or a replacement in a test.
        on_event: Called when a service starts, and when one of its actors dies.
        be_patient: Called first, in the broker's process, to set how long to wait for the storage.
        keep_ledger: Copies a file to the sweep's remote storage as the ledger with a name; None without remote storage.
    """

    def __init__(
        self,
        prefix: str,
        ledgers: str,
        max_services: int,
        placement_groups: Sequence[Any] | None = None,
        start: Callable[..., Any] | None = None,
        on_event: Callable[[Any], None] | None = None,
        be_patient: Callable[[], None] = lambda: None,
        keep_ledger: Callable[[str, str], None] | None = None,
    ) -> None:
        be_patient()
        self.prefix, self.ledgers, self.max_services = prefix, ledgers, max_services
        self._start, self._on_event, self._keep_ledger = start, on_event, keep_ledger
        # A broker that was restarted gets all groups again, including those that have been removed since.
        self._groups = [group for group in placement_groups or [] if not _is_removed(group)]
        self._slots: dict[str, _Slot] = {}
        self._stopping = 0
        self._ledgers_in_use: set[str] = set()
        self._last_beat: dict[str, float] = {}
        self._failed: dict[str, _Failed] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        if keep_ledger is not None:
            threading.Thread(target=self._keep_ledgers, name="ledgers", daemon=True).start()

    def acquire(self, trial: str, spec: ServiceSpec, broken: str | None = None) -> Entry | None:
        """Give a trial its service; idempotent. Never waits.

        Args:
            trial: Name of the trial.
            spec: The service that it needs.
            broken: Name of a service that did not answer this trial; it is replaced.

        Returns:
            The running service; None if it is not up yet, or if there is no room yet: call again.

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
                slot = self._begin(spec)
            if slot is None:
                return None
            slot.holders.add(trial)
            slot.used, slot.touched = time.monotonic(), True
            return None if slot.service is None else Entry(slot.name, slot.service.secret)

    def prepare(self, spec: ServiceSpec) -> bool:
        """Start a service in advance; returns whether it is up, or will be soon.

        Raises:
            ArtifactError: The victim's folder is damaged.
            ServiceUnavailable: The service could not be started.
        """
        with self._lock:
            self._forget_silent()
            return spec.key in self._slots or self._begin(spec) is not None

    def close(self, key: str) -> bool:
        """Stop a service that is no longer needed; returns False if a trial holds it, or it is being started."""
        with self._lock:
            self._forget_silent()
            slot = self._slots.get(key)
            if slot is not None and (slot.holders or slot.service is None):
                return False
            if slot is not None:
                self._stop(key)
            return True

    def beat(self, trial: str) -> None:
        """Note that a trial is alive."""
        self._last_beat[trial] = time.monotonic()

    def release(self, trial: str) -> None:
        """Release the service of a trial, if it has one."""
        with self._lock:
            for slot in self._slots.values():
                slot.holders.discard(trial)
            self._last_beat.pop(trial, None)

    def holders(self) -> dict[str, list[str]]:
        """Return the holders of each running service, by the service's name."""
        with self._lock:
            return {slot.name: sorted(slot.holders) for slot in self._slots.values() if slot.service is not None}

    def state(self) -> dict[str, ServiceState]:
        """Return the services that are up or being started, by key."""
        with self._lock:
            self._forget_silent()
            return {key: ServiceState(s.service is not None, len(s.holders)) for key, s in self._slots.items()}

    def shrink(self, services: int) -> list[Any]:
        """Reserve room for at most ``services`` services from now on; services that are up stay.

        Returns:
            The placement groups that are no longer needed: their owner can remove them.
        """
        with self._lock:
            self.max_services = max(services, len(self._slots) + self._stopping, 1)
            spare = max(0, len(self._slots) + self._stopping + len(self._groups) - self.max_services)
            free, self._groups = self._groups[:spare], self._groups[spare:]
            return free

    def stop(self) -> None:
        """Stop all services, and wait for that."""
        self._ended.set()
        with self._lock:
            threads = [self._stop(key) for key in list(self._slots)]
        for thread in threads:
            if thread is not None:
                thread.join()

    def _forget_silent(self) -> None:
        now = time.monotonic()
        for slot in self._slots.values():
            slot.holders -= {t for t in slot.holders if now - self._last_beat.get(t, 0.0) > HOLDER_EXPIRY_S}

    def _has_room(self) -> bool:
        """Whether a service can be started now; if not, one without holders is stopped to make room."""
        if len(self._slots) + self._stopping < self.max_services:
            return True
        idle = [key for key, slot in self._slots.items() if not slot.holders and slot.service is not None]
        if idle:
            self._stop(min(idle, key=lambda key: self._slots[key].used))
        return len(self._slots) + self._stopping < self.max_services

    def _begin(self, spec: ServiceSpec) -> _Slot | None:
        """Start a service in a thread; None if there is no room yet, or if a start failed and is retried later.

        A start can fail for a while: the processes of a driver that was killed may still hold the ledger open.
        """
        failed = self._failed.get(spec.key, _Failed())
        if failed.error is not None:
            del self._failed[spec.key]
            raise failed.error
        ledger_held = spec.key in self._ledgers_in_use  # by a service with these settings that is being stopped
        if time.monotonic() < failed.pause_until or ledger_held or not self._has_room():
            return None
        name = f"{self.prefix}-{spec.key}-{uuid.uuid4().hex[:6]}"
        slot = self._slots[spec.key] = _Slot(spec, name, self._groups.pop() if self._groups else None)
        self._ledgers_in_use.add(spec.key)
        thread = threading.Thread(target=self._run_start, args=(slot,), name=f"start-{spec.key[:8]}", daemon=True)
        thread.start()
        return slot

    def _run_start(self, slot: _Slot) -> None:
        """Start a service, without the lock."""
        spec = slot.spec
        start = self._start
        if start is None:
            from mea_ray.service.pool import VictimService

            start = VictimService.start
        try:
            service = start(
                spec.folder,
                slot.name,
                spec.settings,
                ledger_path=f"{self.ledgers}/{spec.key}.sqlite",
                placement_group=slot.group,
            )
        except Exception as error:
            self._note_failure(slot, error)
            return
        with self._lock:
            self._failed.pop(spec.key, None)
            wanted = self._slots.get(spec.key) is slot and not self._ended.is_set()
            slot.service = service
        if not wanted:  # stopped while it was being started
            self._run_stop(slot)
            return
        if self._on_event is not None:
            self._on_event(ServiceStarted(slot.name, spec.victim))
            emit = self._on_event
            service.watch(lambda text: emit(Warned(f"service of victim {spec.victim[:8]}: {text}")))

    def _note_failure(self, slot: _Slot, error: Exception) -> None:
        key = slot.spec.key
        with self._lock:
            failed = self._failed.setdefault(key, _Failed())
            failed.attempts += 1
            failed.pause_until = time.monotonic() + _START_PAUSE_S
            if not isinstance(error, ServiceUnavailable) or failed.attempts >= _START_ATTEMPTS:
                # A permanent error is raised to the next caller.
                what = f"{type(error).__name__}: {error}"
                failed.error = error if isinstance(error, _EXPECTED) else ServiceUnavailable(what)
            if self._slots.get(key) is slot:
                del self._slots[key]
            else:
                self._stopping -= 1
            self._free(slot)

    def _stop(self, key: str) -> threading.Thread | None:
        """Take a service from its trials; it is stopped in a thread, or by the thread that is starting it."""
        slot = self._slots.pop(key)
        self._stopping += 1
        if slot.service is None:
            return None
        thread = threading.Thread(target=self._run_stop, args=(slot,), name=f"stop-{key[:8]}", daemon=True)
        thread.start()
        return thread

    def _run_stop(self, slot: _Slot) -> None:
        """Stop a service, without the lock; its room is free only then."""
        try:
            self._copy_ledger(slot)
            slot.service.stop()
        finally:
            with self._lock:
                self._stopping -= 1
                self._free(slot)

    def _free(self, slot: _Slot) -> None:
        self._ledgers_in_use.discard(slot.spec.key)
        if slot.group is not None:
            self._groups.append(slot.group)

    def _keep_ledgers(self) -> None:
        """Periodically copy the ledgers that may have changed to remote storage."""
        while not self._ended.wait(LEDGER_COPY_S):
            with self._lock:
                self._forget_silent()
                changed = [slot for slot in self._slots.values() if slot.service is not None and slot.touched]
                for slot in changed:
                    slot.touched = bool(slot.holders)
            for slot in changed:
                self._copy_ledger(slot)

    def _copy_ledger(self, slot: _Slot) -> None:
        if self._keep_ledger is None:
            return
        name = f"{slot.spec.key}.sqlite"
        copy = Path(self.ledgers) / f".{name}.copy"
        try:
            slot.service.copy_ledger(copy)
            self._keep_ledger(str(copy), name)
        except (MeaRayError, OSError) as error:
            logger.warning("the ledger %s could not be copied to the storage: %s", name, error)
        finally:
            copy.unlink(missing_ok=True)


def _is_removed(group: Any) -> bool:
    from ray.util.placement_group import PlacementGroup, placement_group_table

    return isinstance(group, PlacementGroup) and placement_group_table(group).get("state") == "REMOVED"


class Hold:
    """A trial's hold on its service: waits for it, sends heartbeats while it is held, releases it.

    Args:
        broker: Handle of the broker actor.
        trial: Name of the trial.
        spec: The service that it needs.
        answers: Returns whether a service answers; one that does not is replaced.
        pulse: Called at every heartbeat, in its thread.
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
    """Wait for the broker's answer; an error of mea_ray is raised as itself, not wrapped in Ray's.

    Raises:
        ServiceUnavailable: The broker does not answer.
    """
    from mea_ray.service.naming import answer_of

    return answer_of("the broker of the victim services", reference)


def needs(configs: list[ExperimentConfig], max_services: int) -> tuple[int, dict[str, float], int]:
    """Return the maximum needs of the services.

    Args:
        configs: Experiments that will be served.
        max_services: Maximum number of services up at once.

    Returns:
        Services up at once, resources of one replica (the largest of each kind), replicas of one service.
    """
    specs: set[str] = set()
    cpus = gpus = 0.0
    replicas = 1
    for config in configs:
        if config.thief.blackbox is not None:  # someone else runs the service
            continue
        served = config.service.serving
        specs.add(digest([identity(part) for part in (config.data, config.victim, served)]))
        cpus, gpus = max(cpus, served.cpus_per_replica), max(gpus, served.gpus_per_replica)
        replicas = max(replicas, served.replicas)
    bundle = {key: value for key, value in {"CPU": cpus, "GPU": gpus}.items() if value > 0}
    return min(max_services, len(specs)), bundle, replicas


def demand_of(sweep: SweepConfig, configs: list[ExperimentConfig]) -> cluster.Demand:
    """Return the experiments' demand on the cluster; for ``max_services: auto`` with all services that they use."""
    auto = sweep.max_services == "auto"
    most = len(configs) if sweep.max_services == "auto" else sweep.max_services
    services, replica, replicas = needs(configs, most)
    trials = len(configs)
    if sweep.search.adaptive:
        trials = sweep.search.samples
        if any(path.startswith(("victim.", "data.", "service.")) for path in sweep.space):
            services = trials if sweep.max_services == "auto" else sweep.max_services
    reserved = sweep.base.resources
    return cluster.Demand(
        services, replica, replicas, reserved.trial, reserved.victim, reserved.placement, trials=trials, auto=auto
    )
