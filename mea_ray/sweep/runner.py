"""The driver of a sweep: starts models, services and trials as soon as each can run, and collects results."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_ray.config import SweepConfig
from mea_ray.core import plugins
from mea_ray.core.errors import DataError
from mea_ray.core.versions import command_line
from mea_ray.experiment.data import Contents
from mea_ray.results.portable import anonymous, cleaned
from mea_ray.service.naming import NAMESPACE
from mea_ray.storage.files import PATIENCE
from mea_ray.sweep import cluster, events, search, tune_classes
from mea_ray.sweep.admission import services_groups
from mea_ray.sweep.broker import Broker, demand_of
from mea_ray.sweep.callback import Finisher
from mea_ray.sweep.event_log import EventLog
from mea_ray.sweep.feeder import Feeder
from mea_ray.sweep.folder import StoredResults, SweepFolder
from mea_ray.sweep.loading import Loaded, load
from mea_ray.sweep.metrics import SweepMetrics
from mea_ray.sweep.modules import modules_to_send
from mea_ray.sweep.needs import Needs
from mea_ray.sweep.only_driver import only_driver
from mea_ray.sweep.plan import Draft, Plan, PlannedTrial, draft, plan, recorded_contents
from mea_ray.sweep.schedule import Node, Schedule
from mea_ray.sweep.sink import EventSink, SinkSender
from mea_ray.sweep.tasks import Tasks
from mea_ray.sweep.trainable import TrialContext
from mea_ray.sweep.trial import Work, run_trial
from mea_ray.sweep.tuning import Tuning
from mea_ray.sweep.wandb_nodes import NodeWandb
from mea_ray.tracking import trackers

if TYPE_CHECKING:
    from ray.tune import ResultGrid

logger = logging.getLogger(__name__)

SAME_WARNING_S = 60.0


@dataclass(frozen=True)
class SweepOutcome:
    """The outcome of a sweep.

    Attributes:
        folder: The sweep's folder.
        results: All finished trials, including earlier ones, in the order of their names; read lazily.
        failed: Failed trials, with the reason.
        grid: Ray Tune's result grid of the trials that it ran; None if it ran none. Tune's own files are deleted.
    """

    folder: Path
    results: StoredResults
    failed: dict[str, str] = field(default_factory=dict)
    grid: ResultGrid | None = None


def run_sweep(
    sweep: SweepConfig,
    *,
    resume: bool = False,
    address: str | None = None,
    on_event: events.OnEvent | None = None,
    work: Work = run_trial,
) -> SweepOutcome:
    """Run a sweep, or the rest of it.

    Args:
        sweep: The sweep.
        resume: Continue in the folder of an earlier start; nothing that is finished there is repeated.
        address: Ray cluster, ``host:port`` or ``auto``; None uses the Ray of this process, or starts one on this
            machine.
        on_event: Called with one event at a time, from a separate thread.
        work: The work of a trial; replaced only to measure the overhead of the sweep itself.

    Returns:
        The results. Failed trials do not fail the sweep.

    Raises:
        ConfigError: The sweep cannot be run; nothing was trained. Or its folder exists and ``resume`` is not set.
        KeyboardInterrupt: Ctrl-C; finished work is on disk.
    """
    address = cluster.check_address(address)
    search.check_metric(sweep)
    tune_classes.check(sweep)
    drafts = draft(sweep)
    py_modules = modules_to_send(sweep.resolved(), sweep.base.resources.py_modules, address)
    folder = SweepFolder(sweep.base.storage, sweep.name)
    folder.storage.check_writable()
    warn = lambda text: on_event(events.Warned(text)) if on_event else None  # noqa: E731
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_driver(folder.storage, sweep.name, warn))
        pending, known = _pending(sweep, drafts, folder, folder.begun(resume=resume))
        if not pending:
            return _run(
                sweep, plan(sweep, _read_again(drafts, known), drafts), folder, None, on_event, work, resume=True
            )
        stack.enter_context(cluster.quiet())
        shared = address is not None or cluster.is_running()
        ray = stack.enter_context(cluster.ray_cluster(address, py_modules))
        demand = demand_of(sweep, [each.config for each in pending])
        at_once = cluster.wait_for_room(demand.least, ray, sweep.cluster_wait_s)
        demand = demand.resolved(ray.cluster_resources())
        data = load(ray, pending, known, warn)
        start = _Start(ray, demand, at_once, data, shared)
        return _run(sweep, plan(sweep, data.contents, drafts), folder, start, on_event, work, resume=resume)


@dataclass(frozen=True)
class _Start:
    """A Ray with enough resources for the sweep and its data in the object store; other sweeps may share it."""

    ray: Any
    demand: cluster.Demand
    at_once: int
    data: Loaded
    shared: bool


def _pending(sweep: SweepConfig, drafts: list[Draft], folder: SweepFolder, begun: bool) -> tuple[list[Draft], Contents]:
    """Return the experiments that may have to be run, and the fingerprints of the data at the start of the sweep."""
    if not begun:
        return drafts, Contents()
    known = recorded_contents(folder.path / "plan.json")
    done = {result.trial for result in folder.results()} | folder.stopped()
    if sweep.search.adaptive:
        return (drafts if len(done) < sweep.search.samples else []), known
    return [each for each in drafts if each.name(known) not in done], known


def _read_again(drafts: list[Draft], known: Contents) -> Contents:
    """Read the data of a finished sweep again, to detect changes; trust the plan if they are missing."""
    try:
        now = Contents()
        for each in drafts:
            now.of(each.config)
    except DataError:
        return known
    return now


def _run(
    sweep: SweepConfig,
    the_plan: Plan,
    folder: SweepFolder,
    start: _Start | None,
    on_event: events.OnEvent | None,
    work: Work,
    *,
    resume: bool,
) -> SweepOutcome:
    """Run the rest of a planned sweep; without a ``start`` nothing is left."""
    folder.open(sweep, the_plan, resume=resume)
    finished = folder.results()
    stopped = folder.stopped() if resume else set()
    done = {result.trial for result in finished} | stopped
    left = [] if the_plan.adaptive else [trial for trial in the_plan.trials if trial.name not in done]
    samples = the_plan.trial_count - len(done) if the_plan.adaptive else len(left)
    if plugins.is_path(sweep.search.name):  # it suggests from the start again; finished trials return at once
        samples = the_plan.trial_count
    log = EventLog(folder)
    emit = _Emitter(on_event or (lambda event: None), log)
    wandb = NodeWandb(folder, sweep.base.tracking, lambda text: emit(events.Warned(text)))
    emit.listeners.append(wandb.follow)
    emit(
        events.SweepStarted(
            str(folder.path),
            the_plan.trial_count,
            len(done),
            the_plan.victim_count,
            the_plan.null_count,
            sum(trial.queries for trial in left) if not the_plan.adaptive else the_plan.queries,
            command=command_line(),
        )
    )
    for path in finished.paths:
        if path.stem not in done:
            emit(events.Warned(f"{path} is damaged or not of this trial; the trial continues from its finished rungs"))
    tracker = trackers(sweep.base.tracking, folder.path, sweep.name, wandb.warn, wandb)
    tree = sweep.resolved()
    tracker.log_config(cleaned({**tree, "base": anonymous(tree["base"])}))
    finisher = Finisher(folder, tracker, emit)
    emit.listeners.append(finisher.follow)
    how, grid = "failed", None
    try:
        patience = PATIENCE.during(
            sweep.base.resources.storage_patience_s,
            folder.marker,
            lambda text: emit(events.Warned(text)),
            **folder.patience(),
        )
        with contextlib.ExitStack() as stack:
            if start is not None:
                stack.enter_context(patience)
                wandb.attach(start.ray)
                stack.callback(wandb.detach)
            for trial in sorted(done - stopped):  # a driver that was killed may have logged none of them
                finisher.show(trial)
            if start is not None:
                grid = _Driver(sweep, the_plan, folder, finisher, emit, start, work).run(left, samples)
            results = folder.results()
            expected = {trial.name for trial in the_plan.trials} if not the_plan.adaptive else done | finisher.ended
            expected -= finisher.put_off | folder.stopped()
            for trial in sorted(expected - {result.trial for result in results} - set(finisher.failed)):
                finisher.fail(trial, "its result was removed or damaged meanwhile; --resume computes it again")
            finisher.drain()
            tracker.summarize(results)
        how = "done"
    except KeyboardInterrupt:
        how = "interrupted"
        raise
    finally:
        finisher.close()
        log.close(how)
        if how == "failed" and not resume:
            folder.discard_if_unused()
    return SweepOutcome(folder.path, results, dict(finisher.failed), grid)


class _Emitter:
    """Passes events to the log and the listener, one at a time; a failing listener does not stop the sweep."""

    def __init__(self, on_event: events.OnEvent, log: EventLog) -> None:
        self._on_event, self.log, self._lock = on_event, log, threading.Lock()
        self._warned: dict[str, float] = {}
        self.listeners: list[events.OnEvent] = []

    def __call__(self, event: events.Event) -> None:
        with self._lock:
            if isinstance(event, events.Warned) and self._just_warned(event.message):
                return
            self.log(event)
            for listener in self.listeners:
                listener(event)
            try:
                self._on_event(event)
            except Exception:
                logger.exception("the listener of the sweep's events failed on %r; the sweep continues", event)

    def _just_warned(self, message: str) -> bool:
        """Every process notices when the storage is unavailable; one warning is enough."""
        now = time.monotonic()
        before, self._warned[message] = self._warned.get(message), now
        return before is not None and now - before < SAME_WARNING_S


class _Driver:
    """One run of a sweep on a running Ray."""

    def __init__(
        self,
        sweep: SweepConfig,
        the_plan: Plan,
        folder: SweepFolder,
        finisher: Finisher,
        emit: _Emitter,
        start: _Start,
        work: Work,
    ) -> None:
        self.sweep, self.plan, self.folder = sweep, the_plan, folder
        self.finisher, self.emit, self.start, self.ray, self.work = finisher, emit, start, start.ray, work
        self.name = f"{sweep.name}-{uuid.uuid4().hex[:8]}"
        """Id of this run; its actors are named after it."""

    def run(self, left: list[PlannedTrial], samples: int) -> ResultGrid | None:
        """Run the rest; return Tune's result grid, None if it ran nothing."""
        from ray.util.metrics import Gauge

        demand, data = self.start.demand, self.start.data.references
        # With an autoscaler, pending trials make the cluster grow further.
        at_once = samples if self.sweep.cluster_wait_s else self.start.at_once
        at_once = min(at_once, self.sweep.max_concurrent_trials or at_once)
        if not samples:
            return None
        self._metrics = SweepMetrics(self.sweep.name, Gauge)
        self.emit.listeners.append(self._metrics.follow)
        with contextlib.ExitStack() as stack:
            emit = stack.enter_context(self._events())
            feeder: Feeder | None = self._feeder(left, emit, demand.services, at_once)
            if feeder is not None and not cluster.has_room_beside_services(demand, self.ray.nodes()):
                if self.plan.adaptive:  # no model is known beforehand: trials train them in their own slots
                    feeder = None
                else:
                    feeder.train_all()
                    if not feeder.left:
                        return None
            groups = stack.enter_context(services_groups(demand, self.name if self.start.shared else "", self._warn))
            broker = stack.enter_context(self._broker(demand, groups, emit))
            points = {trial.name: trial.point for trial in left}
            contents = self.start.data.contents
            context = TrialContext(self.sweep, self.folder, broker, emit, points, contents, self.work)
            self.finisher.begin(context)
            if feeder is not None:
                stack.enter_context(feeder.feeding(broker))
            tuning = Tuning(context, self.finisher, data, at_once, feeder, self._needs.of_suggestion)
            tuning.run(samples)
            return tuning.grid

    def _feeder(self, left: list[PlannedTrial], emit: SinkSender, services: int, at_once: int) -> Feeder:
        """Return the feeder that trains every distinct victim and null model, and starts the services."""
        needs = self._needs = Needs(self.folder, self.start.data, emit, self.ray, self.sweep.max_failures)
        nodes = [needs.node(trial.name, trial) for trial in left]
        demand, total, tasks = self.start.demand, self.ray.cluster_resources(), Tasks(self._warn)
        trainings = cluster.trainings_at_once(demand, total)
        if self.sweep.cluster_wait_s:
            trainings = max(len(needs.models), at_once)
        schedule = Schedule(nodes, max(1, services), at_once, trainings=trainings, grows=self.plan.adaptive)
        # A point of a search whose models cannot be trained is run all the same: its trial reports why.
        fail = (lambda name, reason: schedule.add(Node(name, "", ()))) if self.plan.adaptive else self.finisher.fail
        train = partial(needs.train, tasks)
        return Feeder(schedule, needs.specs, train, tasks, fail, self._warn, self._metrics.slots)

    def _warn(self, text: str) -> None:
        self.emit(events.Warned(text))

    @contextlib.contextmanager
    def _events(self) -> Iterator[SinkSender]:
        """Run the event sink and the thread that drains it; yields the sender."""
        ray = self.ray
        name = f"{self.name}-events"
        here = cluster.on_this_node()
        sink = (
            ray.remote(EventSink).options(name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here).remote()
        )
        stop = threading.Event()
        turn = threading.Lock()

        def drain() -> None:
            with turn, contextlib.suppress(ray.exceptions.RayError):
                for event in ray.get(sink.drain.remote(), timeout=10):
                    self.emit(event)

        def pump() -> None:
            while not stop.wait(0.2):
                drain()
                self.emit.log.beat()
                self._metrics.update()

        thread = threading.Thread(target=pump, name="sweep-events", daemon=True)
        thread.start()
        self.finisher.before_emitting = drain
        try:
            yield SinkSender(name)
        finally:
            stop.set()
            thread.join(15)
            drain()
            self.finisher.before_emitting = lambda: None
            ray.kill(sink)

    @contextlib.contextmanager
    def _broker(self, demand: cluster.Demand, groups: list[Any], emit: SinkSender) -> Iterator[Any]:
        ray, prefix = self.ray, self.name
        be_patient = partial(self.folder.be_patient, self.sweep.base.resources.storage_patience_s, emit)
        keep = self.folder.keep_ledger if self.folder.storage.remote is not None else None
        self.folder.fetch_ledgers()
        broker = (
            ray.remote(Broker)
            .options(
                # Without a name: only holders of its handle can request a service, and so its secret.
                num_cpus=0,
                # The services live as long as their broker: it must not run on a node that can leave the cluster.
                scheduling_strategy=cluster.on_this_node(),
                max_concurrency=16,
                max_restarts=-1,
                max_task_retries=-1,
            )
            .remote(prefix, str(self.folder.path / "ledgers"), demand.services, groups, None, emit, be_patient, keep)
        )
        try:
            yield broker
        finally:
            with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                ray.get(broker.stop.remote(), timeout=30)
            ray.kill(broker)
