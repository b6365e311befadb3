"""Estimates a sweep's time, memory and disk from a few measured training steps on this machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import psutil

from mea_ray.blackbox.query_log import sample_size
from mea_ray.config import ExperimentConfig, KeepConfig, digest, identity
from mea_ray.core.errors import ConfigError, MeaRayError
from mea_ray.core.types import ImageSet, Splits
from mea_ray.experiment.checks import build_network
from mea_ray.experiment.data import splits_key
from mea_ray.experiment.names import sample_filter
from mea_ray.experiment.owner import train_null, train_victim
from mea_ray.storage.files import at_home
from mea_ray.sweep import cluster
from mea_ray.sweep.plan import Plan, PlannedTrial
from mea_ray.training.device import device, device_name, threads, visible_gpus
from mea_ray.training.engine import train
from mea_ray.training.objective import CrossEntropy

BATCHES = 3
"""Number of measured steps: enough for a rough estimate, few enough for a quick plan."""
PIXELS = 128 * 32 * 32
"""Maximum number of pixels per channel in a measured step (at least 16 images)."""
LEDGER_ROW = 200
"""Size of a request in the ledger, in bytes: its id, its hash, and their index."""
PATIENCE_S = 15.0
"""Time limit of measuring, in seconds; the rest is assumed to be as fast as what was measured."""


@dataclass
class Measured:
    """Seconds per image and bytes of weights, by what is trained.

    Attributes:
        seconds: Seconds per image and epoch, by ``victim_key`` or ``thief_key``.
        weights: Bytes of the weights, by the same.
        data: Bytes of the data, by ``data.splits_key``.
        sizes: Number of training images of a victim, by the same.
        shapes: (channels, height, width) of an image, by the same.
        classes: Length of an answer, by the same.
        spent: Seconds spent measuring.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    spent: float = 0.0

    def measure(self, config: ExperimentConfig, data: Splits) -> None:
        """Measure the unknown parts of an experiment, within the time limit."""
        key = splits_key(config)
        self.data[key] = sum(
            part.images.nbytes
            for part in (data.victim_train, data.victim_validation, data.thief_pool, data.verification, data.test)
        )
        self.sizes[key] = len(data.victim_train)
        self.shapes[key], self.classes[key] = data.shape, data.classes
        for key, work in ((victim_key(config), _victim_step), (thief_key(config), _thief_step)):
            if key in self.seconds or self.spent > PATIENCE_S:
                continue
            started = time.perf_counter()
            self.seconds[key], self.weights[key] = work(config, data)
            self.spent += time.perf_counter() - started

    def per_image(self, key: str) -> float:
        """Return the seconds per image; if not measured, the mean of the measured ones."""
        return self.seconds.get(key, float(np.mean(list(self.seconds.values()))))

    def bytes_of(self, key: str) -> float:
        """Return the bytes of the weights; if not measured, the mean of the measured ones."""
        return self.weights.get(key, float(np.mean(list(self.weights.values()))))


@dataclass(frozen=True)
class Estimate:
    """Upper limits of what a sweep needs.

    Attributes:
        models_s: Seconds to train all victims and null models, one after the other.
        substitutes_s: The same of all substitutes, those of null models included.
        data: Bytes of the data in Ray's object store.
        process: Bytes of one training process, including its program.
        disk: Bytes of all models on the storage.
        answers: Bytes of all transfer sets on the storage.
        logs: Bytes of the owner's query logs and ledgers, which the driver's machine holds.
        measured_on: Name of the device of the measurement.
        complete: Whether everything was measured; otherwise the rest is assumed to be alike.
    """

    models_s: float
    substitutes_s: float
    data: int
    process: int
    disk: float
    answers: float
    logs: float
    measured_on: str
    complete: bool


def choosing_models(config: ExperimentConfig) -> int:
    """Return how many models are trained to choose the samples of a victim's key."""
    shadow = config.verification.shadow
    return 0 if sample_filter(config) == "none" else shadow.thieves + shadow.null_models


def victim_key(config: ExperimentConfig) -> str:
    """Return a string that is equal for victims that are trained at the same speed."""
    training = config.victim.training
    kind = [identity(config.data), identity(config.victim.model), identity(config.victim.pretext)]
    return digest([*kind, identity(config.victim.watermark), training.precision, training.compile])


def thief_key(config: ExperimentConfig) -> str:
    """Return a string that is equal for substitutes that are trained at the same speed."""
    training = config.thief.training
    return digest([identity(config.data), identity(config.thief.model), training.precision, training.compile])


def estimate(plan: Plan, measured: Measured, keep: KeepConfig = KeepConfig()) -> Estimate | None:
    """Return what a sweep needs; None if nothing could be measured because its data are missing.

    Args:
        plan: The sweep.
        measured: The measurements.
        keep: What remains of finished trials in the storage.
    """
    if not measured.seconds:
        return None
    trials = plan.trials
    victims = [victim.config for victim in plan.victims.values()]
    configs = victims + [config for config, _ in plan.nulls.values()]
    models_s = sum(victim_seconds(config, measured) for config in configs)
    models_s += sum(choosing_models(config) * victim_seconds(config, measured) for config in victims)
    models_s *= (plan.victim_count + plan.null_count) / max(1, len(configs))
    times = plan.trial_count / max(1, len(trials))
    substitutes_s = sum(trial_seconds(trials, measured).values()) * times
    disk = sum(measured.bytes_of(victim_key(config)) for config in configs)
    stored = list(trials) if keep.substitutes else []
    if keep.stolen_nulls:
        stored += {theft: trial for trial in trials for theft in stolen_nulls(trial)}.values()
    disk += sum(measured.bytes_of(thief_key(t.config)) * len(t.config.thief.budgets) for t in stored) * times
    wanted = {key for trial in trials for key in (victim_key(trial.config), thief_key(trial.config))}
    return Estimate(
        models_s=models_s,
        substitutes_s=substitutes_s,
        data=sum(measured.data.values()),
        process=psutil.Process().memory_info().rss,
        disk=disk,
        answers=sum(_answers_bytes(trial, measured) for trial in trials) * times if keep.answers else 0.0,
        logs=sum(_log_bytes(trial, measured, images=keep.query_logs) for trial in trials) * times,
        measured_on=device_name(),
        complete=wanted <= set(measured.seconds),
    )


def this_machine() -> dict[str, float]:
    """Return the resources that Ray would have on this machine."""
    cpus = len(psutil.Process().cpu_affinity() or []) if hasattr(psutil.Process, "cpu_affinity") else 0
    return {"CPU": float(cpus or psutil.cpu_count() or 1), "GPU": float(visible_gpus())}


def memory() -> int:
    """Return the bytes of memory of this machine."""
    return int(psutil.virtual_memory().total)


def free_disk(storage: str) -> int:
    """Return the free bytes on the disk of a storage's folder."""
    folder = at_home(storage.removeprefix("file://"), "storage").absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def room(demand: cluster.Demand, total: Mapping[str, float]) -> tuple[int, str]:
    """Return how many trials run at once with these resources, and, if none, why."""
    try:
        return cluster.check(demand, total), ""
    except ConfigError as error:
        return 0, str(error)


def _answers_bytes(trial: PlannedTrial, measured: Measured) -> float:
    """Return the bytes of a trial's transfer set: a number per class, the image's name, and a probe flag."""
    classes = measured.classes.get(trial.splits, max(measured.classes.values(), default=0))
    return float(trial.queries * (4 * classes + 8 + 1))


def _log_bytes(trial: PlannedTrial, measured: Measured, *, images: bool) -> float:
    """Return the bytes of a trial in ledger and query log: a row per request, a class per image, the sample."""
    service = trial.config.service
    ledger = LEDGER_ROW * trial.queries / service.request_images
    if not images:
        return ledger
    shape = measured.shapes.get(trial.splits, max(measured.shapes.values(), default=(0, 0, 0)))
    sample = min(trial.queries, sample_size(shape, service.query_log_images)) if min(shape) else 0
    return ledger + 2.0 * trial.queries + float(sample * np.prod(shape))


def victim_seconds(config: ExperimentConfig, measured: Measured) -> float:
    """Return the seconds in which a victim, or a null model, is trained."""
    images = measured.sizes.get(splits_key(config), max(measured.sizes.values(), default=0))
    return measured.per_image(victim_key(config)) * images * config.victim.training.epochs


def stolen_nulls(trial: PlannedTrial) -> list[tuple[str, str]]:
    """Return a trial's thefts of null models, equal for trials that share them."""
    return [(trial.names.theft, null) for null in trial.nulls[: trial.config.verification.stolen_null_models]]


def trial_seconds(trials: Sequence[PlannedTrial], measured: Measured) -> dict[str, float]:
    """Return the seconds in which each trial's substitutes are trained, by its name.

    Substitutes of null models count for the first trial that needs them.
    """
    seconds: dict[str, float] = {}
    stolen: set[tuple[str, str]] = set()
    for trial in trials:
        new = set(stolen_nulls(trial)) - stolen
        stolen |= new
        images = (1 + len(new)) * sum(trial.config.thief.budgets)
        seconds[trial.name] = measured.per_image(thief_key(trial.config)) * images * trial.config.thief.training.epochs
    return seconds


def _victim_step(config: ExperimentConfig, data: Splits) -> tuple[float, int]:
    """Train a victim on a few images, with its watermark where that can be embedded in so few."""
    batch = _batch(config.victim.training.batch_size, data)
    few = replace(
        data, victim_train=_few(data.victim_train, batch), victim_validation=_few(data.victim_validation, batch)
    )
    training = config.victim.training.changed(epochs=1, batch_size=batch, early_stop_patience=None, compile=False)
    unfiltered = config.verification.model_copy(update={"filter": "none"})
    victim = config.victim.model_copy(update={"training": training})
    config = config.model_copy(update={"victim": victim, "verification": unfiltered})
    clock = _Clock(config.resources.victim.cpus)
    with threads(config.resources.victim.cpus):
        try:
            trained = train_victim(config, few)
        except MeaRayError:
            trained = train_null(config, few, 0)
    size = sum(value.nbytes for value in trained.model.state_dict().values())
    return clock.alone() * trained.info["seconds"] / trained.info["images"], size


def _thief_step(config: ExperimentConfig, data: Splits) -> tuple[float, int]:
    """Train a substitute on a few images of the pool; the content does not change the speed."""
    batch = _batch(config.thief.training.batch_size, data)
    images = data.thief_pool.images[: batch * BATCHES]
    model = build_network(config.thief.model, data.shape, data.classes)
    training = config.thief.training.changed(epochs=1, batch_size=batch, early_stop_patience=None, compile=False)
    labels = np.zeros(len(images), np.int64)
    clock = _Clock(config.resources.trial.cpus)
    with threads(config.resources.trial.cpus):
        report = train(model, images, labels, CrossEntropy(), training, seed=0)
    return clock.alone() * report.seconds / report.images, sum(value.nbytes for value in model.state_dict().values())


class _Clock:
    """Estimates how much faster a measurement would have been on an idle machine.

    Args:
        cpus: CPUs that the measured work uses.
    """

    def __init__(self, cpus: float) -> None:
        self.cpus, self.wall, self.busy = max(1, int(cpus)), time.perf_counter(), time.process_time()

    def alone(self) -> float:
        """Return the fraction of the wall time on an idle machine, in (0, 1]; 1 on a GPU, where it is unknown."""
        if device().type != "cpu":
            return 1.0
        busy = (time.process_time() - self.busy) / self.cpus
        return min(1.0, max(busy / max(time.perf_counter() - self.wall, 1e-9), 1e-3))


def _batch(wanted: int, data: Splits) -> int:
    """Return the number of images in a measured step: as many as in a real one, if that is fast enough."""
    _, height, width = data.shape
    return min(wanted, max(16, PIXELS // (height * width)))


def _few(images: ImageSet, batch: int) -> ImageSet:
    """Return the images of a few steps, of every class in turn."""
    rank = np.empty(len(images), np.int64)
    for label in range(images.classes):
        places = np.flatnonzero(images.labels == label)
        rank[places] = np.arange(len(places))
    count = max(batch * BATCHES, 2 * images.classes)
    return images.take(np.sort(np.argsort(rank, kind="stable")[:count]))
