"""The progress of a sweep, read from its storage by processes other than the one that runs it."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import Any, Literal

from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.storage.files import at_home, refusing
from mea_ray.sweep import event_log, events
from mea_ray.sweep.folder import SweepFolder

State = Literal["running", "silent", "done", "interrupted", "failed", "unknown"]
SILENT_S = 4 * event_log.BEAT_S
"""Seconds without output after which a driver counts as dead."""
_WINDOW = 50


@dataclass
class RunningTrial:
    """A running trial.

    Attributes:
        point: What the sweep set.
        since: When its process started, in seconds since the epoch.
        answers: Images answered.
        budget: Query budget, in images.
        rungs: Rungs done.
        of_rungs: Rungs in all.
        restarts: Number of times that its process died.
    """

    point: dict[str, Any]
    since: float
    answers: int = 0
    budget: int = 0
    rungs: int = 0
    of_rungs: int = 0
    restarts: int = 0


@dataclass
class Status:
    """The progress of a sweep.

    Attributes:
        name: The sweep's name.
        planned: Total number of trials.
        done: Trials whose result is in the storage.
        stopped: Those of ``done`` that the scheduler stopped early.
        running: Running trials, by name.
        failed: Failed trials of the last start, with the reason.
        queries: Images answered, over all starts.
        queries_planned: Maximum number of queries, in images.
        models: Victims and null models that are ready.
        models_planned: Victims and null models in all.
        started: Time of the last start; None without a log.
        last_seen: Time of the driver's last output; None without a log.
        how: How it ended; None while it runs.
        points: Point of each trial that was ever started.
        recent: The most recent events, with their times.
        ends: When the last trials of this start finished.
    """

    name: str
    planned: int = 0
    done: int = 0
    stopped: int = 0
    running: dict[str, RunningTrial] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    queries: int = 0
    queries_planned: int = 0
    models: int = 0
    models_planned: int = 0
    started: float | None = None
    last_seen: float | None = None
    how: str | None = None
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    recent: deque[tuple[float, events.Event]] = field(default_factory=lambda: deque(maxlen=40))
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @property
    def waiting(self) -> int:
        """Number of trials that have not started."""
        return max(0, self.planned - self.done - len(self.running) - len(self.failed))

    def state(self, now: float | None = None) -> State:
        """Return the state of the driver; ``silent`` if its output stopped without an end."""
        if self.how in {"done", "interrupted", "failed"}:
            return self.how  # type: ignore[return-value]
        if self.last_seen is None:
            return "done" if self.planned and self.done >= self.planned else "unknown"
        return "silent" if (time.time() if now is None else now) - self.last_seen > SILENT_S else "running"

    def rate(self) -> float | None:
        """Return finished trials per second over the last fifty of this start; None before there are two."""
        if len(self.ends) < 2 or self.ends[-1] <= self.ends[0]:
            return None
        return (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])

    def seconds_left(self) -> float | None:
        """Return an estimate of the seconds until the last trial ends, at the current rate."""
        rate = self.rate()
        return None if rate is None else (self.waiting + len(self.running)) / rate


def open_folder(location: str) -> SweepFolder:
    """Open a sweep's folder by its path or URI: what ``mea-ray sweep`` printed, or ``s3://bucket/storage/sweep``.

    Raises:
        ConfigError: The URI names no known file system, no sweep was ever started there, or it cannot be read.
    """
    if "://" in location:
        place, mark, options = location.partition("?")  # e.g. the endpoint of an S3 that is not Amazon's
        storage, _, name = place.rstrip("/").rpartition("/")
        storage += mark + options
    else:
        path = at_home(location, "FOLDER").absolute()
        storage, name = str(path.parent), path.name
    folder = SweepFolder(storage, name)
    remedy = "give the folder that `mea-ray sweep` printed"
    with refusing(f"{location} cannot be read", remedy):
        exists = folder.storage.holds(f"{name}/plan.json")
        if exists:
            folder.storage.claim_cache(name)
            folder.storage.pull_file(f"{name}/plan.json")
    if not exists:
        raise ConfigError(f"{location} is not the folder of a sweep: it has no plan.json; {remedy}")
    return folder


def read_status(folder: SweepFolder) -> Status:
    """Read the progress of a sweep; nothing is written and no running process is contacted.

    Raises:
        ArtifactError: ``plan.json`` is damaged.
    """
    folder.storage.pull_grown(f"{folder.name}/{event_log.EVENTS}")
    try:
        plan = json.loads((folder.path / "plan.json").read_text(encoding="utf-8"))
        status = Status(folder.name, planned=int(plan["trial_count"]))
        status.queries_planned = sum(victim["queries"] for victim in plan["victims"].values())
        status.models_planned = len(plan["victims"]) + len(plan["nulls"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{folder.path / 'plan.json'} is damaged: {error}; restore it from a copy, or start the sweep under "
            "another name (name=...), which reuses the trained models"
        ) from error
    # Listed before the log is read: a trial that ends in between is not counted as running.
    finished = {name.removesuffix(".json") for name in folder.storage.names(f"{folder.name}/results")}
    fold = _Fold(status)
    for at, name, fields in event_log.read(folder.path / event_log.EVENTS):
        fold(at, name, fields)
    finished |= fold.finished & {name.removesuffix(".json") for name in folder.storage.names(f"{folder.name}/results")}
    status.done = len(finished)
    status.queries = sum(fold.answers.values())
    status.running = {name: trial for name, trial in status.running.items() if name not in finished}
    if status.state() != "running":
        status.running = {}
    return status


class _Fold:
    """Accumulates the lines of the log, which can come from several starts."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.answers: dict[str, int] = {}
        self.finished: set[str] = set()
        self._stopped: set[str] = set()
        self._models: set[str] = set()
        self._at = 0.0

    def __call__(self, at: float, name: str, fields: dict[str, Any]) -> None:
        self._at = self.status.last_seen = at
        if name == event_log.ENDED:
            self.status.how = str(fields.get("how"))
            return
        event = event_log.event_of(name, fields)
        if event is not None:
            self.status.recent.append((at, event))
            self._take(event)
            self.status.stopped, self.status.models = len(self._stopped), len(self._models)

    @singledispatchmethod
    def _take(self, event: events.Event) -> None:
        pass

    @_take.register
    def _(self, event: events.SweepStarted) -> None:
        status = self.status
        status.started, status.how, status.planned = self._at, None, event.trials
        status.models_planned = event.victims + event.nulls
        status.running.clear()
        status.failed.clear()
        status.ends.clear()

    @_take.register
    def _(self, event: events.ModelReady) -> None:
        self._models.add(event.name)

    @_take.register
    def _(self, event: events.TrialStarted) -> None:
        before = self.status.running.get(event.trial)
        self.status.points[event.trial] = event.point
        self.status.running[event.trial] = RunningTrial(
            point=event.point,
            since=self._at,
            answers=self.answers.get(event.trial, 0),
            budget=max(event.budgets),
            rungs=event.rungs_done,
            of_rungs=len(event.budgets),
            restarts=before.restarts if before else 0,
        )

    @_take.register
    def _(self, event: events.Queried) -> None:
        self._answered(event.trial, event.answers)

    @_take.register
    def _(self, event: events.RungFinished) -> None:
        self._answered(event.trial, event.queries)
        if event.trial in self.status.running:
            self.status.running[event.trial].rungs += 1

    @_take.register(events.TrialRestarted)
    @_take.register(events.TrialMadeWay)
    def _(self, event: events.TrialRestarted | events.TrialMadeWay) -> None:
        if event.trial in self.status.running:
            self.status.running[event.trial].restarts += 1

    @_take.register
    def _(self, event: events.TrialFailed) -> None:
        self.status.running.pop(event.trial, None)
        self.status.failed[event.trial] = event.reason

    @_take.register
    def _(self, event: events.TrialFinished) -> None:
        self.status.running.pop(event.trial, None)
        self.status.failed.pop(event.trial, None)
        self.finished.add(event.trial)
        self.status.ends.append(self._at)
        (self._stopped.add if event.stopped else self._stopped.discard)(event.trial)

    def _answered(self, trial: str, answers: int) -> None:
        self.answers[trial] = max(answers, self.answers.get(trial, 0))
        if trial in self.status.running:
            self.status.running[trial].answers = self.answers[trial]
