"""The events of a sweep, as plain records; progress displays use nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from mea_ray.results.records import DetectionResult, RemovalResult, RungResult
from mea_ray.sweep.space import Point


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class SweepStarted(Event):
    """The sweep starts. ``finished`` trials are done from an earlier start and not repeated; ``command`` started it."""

    folder: str
    trials: int
    finished: int
    victims: int
    nulls: int
    queries: int
    command: str = ""


@dataclass(frozen=True)
class ModelEpoch(Event):
    """An epoch of a victim's or a null model's training ended.

    Attributes:
        role: ``victim`` or ``null``.
        name: Name of the artifact.
        epoch: Epochs done, over all stages of the training.
        record: What the training engine reported (losses, accuracy, rates). ``resumed`` is in the first one of a
            resumed training.
        epochs: Epochs in the config; a scheme with several stages may train more.
    """

    role: Literal["victim", "null"]
    name: str
    epoch: int
    epochs: int
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelReady(Event):
    """A victim or null model is trained, or was found in the storage."""

    role: Literal["victim", "null"]
    name: str
    folder: str


@dataclass(frozen=True)
class ServiceStarted(Event):
    """A victim service is up."""

    name: str
    victim: str


@dataclass(frozen=True)
class TrialStarted(Event):
    """A process starts or resumes a trial.

    Attributes:
        trial: Name of the trial.
        point: What the sweep set.
        pid: Id of its process on ``node``.
        node: Ray's id of the node.
        budgets: Its rungs.
        rungs_done: Rungs finished by earlier processes.
        victim: Name of its victim; empty without one.
    """

    trial: str
    point: Point
    pid: int
    node: str
    budgets: tuple[int, ...]
    rungs_done: int
    victim: str = ""


@dataclass(frozen=True)
class Queried(Event):
    """A trial has ``answers`` to images, out of its ``budget``."""

    trial: str
    answers: int
    budget: int


@dataclass(frozen=True)
class Phase(Event):
    """A part of a trial begins: the ``number``-th ``substitute``, ``null theft``, ``removal`` or ``detection``."""

    trial: str
    what: str
    number: int
    of: int


@dataclass(frozen=True)
class SubstituteEpoch(Event):
    """An epoch of a substitute's training is done; of many, only some are reported.

    Attributes:
        trial: Name of the trial.
        epoch: Epochs done.
        epochs: Epochs in total.
        loss: Mean loss of the last one.
    """

    trial: str
    epoch: int
    epochs: int
    loss: float


@dataclass(frozen=True)
class RungFinished(Event):
    """A substitute was trained and verified; the numbers are those of its ``ModelReport``."""

    trial: str
    budget: int
    queries: int
    accuracy: float
    fidelity: float | None
    wsr: float | None
    wfpr: float | None
    p_value: float | None


@dataclass(frozen=True)
class Tried(Event):
    """A step after a trial's last rung is done.

    Attributes:
        trial: Name of the trial.
        what: Name of the removal or the detection; ``theft`` of a null model.
        tried_on: ``substitute``, ``victim`` or ``null_model``.
        accuracy: Accuracy of the resulting model; None after a detection, which changes nothing.
        wsr: WSR of the resulting model.
        flagged: Names of the classes that a detection flags.
    """

    trial: str
    what: str
    tried_on: str
    accuracy: float | None = None
    wsr: float | None = None
    flagged: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialRestarted(Event):
    """A trial's process died; the trial is resumed from disk in another process."""

    trial: str
    reason: str


@dataclass(frozen=True)
class TrialMadeWay(Event):
    """A trial ended its process because the replicas of its service are down; it is resumed from disk.

    The replicas may be waiting for its slot. Their failure is an event of the service, not of each trial.
    """

    trial: str
    reason: str


@dataclass(frozen=True)
class TrialFailed(Event):
    """A trial failed; the others continue."""

    trial: str
    reason: str


@dataclass(frozen=True)
class TrialFinished(Event):
    """A trial has ended. ``stopped``: by the scheduler, before its last rung; before the first, ``path`` is empty."""

    trial: str
    path: str
    stopped: bool = False


@dataclass(frozen=True)
class Warned(Event):
    """A problem that does not stop the sweep."""

    message: str


def tried(trial: str, result: RemovalResult | DetectionResult | RungResult) -> Tried:
    """Return the event of a removal, a detection, or the theft of a null model."""
    if isinstance(result, DetectionResult):
        return Tried(trial, str(result.detection["name"]), result.tried_on, flagged=tuple(result.flagged))
    if isinstance(result, RungResult):
        what, on, report = "theft", "null_model", result.report
    else:
        what, on, report = str(result.removal["name"]), result.tried_on, result.after
    return Tried(trial, what, on, report.accuracy, report.wsr.rate if report.wsr else None)


def rung_finished(trial: str, rung: RungResult) -> RungFinished:
    """Return the event of a rung."""
    report = rung.report
    wsr = report.wsr.rate if report.wsr else None
    numbers = (report.accuracy, report.fidelity, wsr, report.wfpr_mean, report.p_value)
    return RungFinished(trial, rung.budget, rung.queries, *numbers)


OnEvent = Callable[[Event], None]
