"""The functions that Ray runs: a trial as a Tune trainable; training a model and loading data as tasks."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mea_ray.config import ExperimentConfig, SweepConfig
from mea_ray.core.errors import AttackDied, DeviceOutOfMemory, ServiceUnavailable, StorageUnavailable
from mea_ray.core.mapped import is_mapped
from mea_ray.experiment.artifacts import Store
from mea_ray.experiment.data import Contents, load_splits, splits_key
from mea_ray.experiment.ports import Role
from mea_ray.results.numbers import METRICS
from mea_ray.results.records import SelectionRecord
from mea_ray.sweep import events
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.plan import PlannedTrial
from mea_ray.sweep.reports import Reports
from mea_ray.sweep.search import point_of
from mea_ray.sweep.space import Point, experiment_at
from mea_ray.sweep.trial import Tools, Work, epoch_events, run_trial

if TYPE_CHECKING:
    from mea_ray.core.types import Splits


@dataclass(frozen=True)
class TrialContext:
    """The common context of all trials of a sweep.

    Attributes:
        sweep: The sweep.
        folder: Its folder.
        broker: Handle of the broker actor.
        emit: Where events go.
        points: The trials' points by name; empty for an adaptive search. Every trial gets all of them, so they are
            small points instead of whole experiments.
        contents: Fingerprints of the sweep's data.
        work: The work of a trial.
    """

    sweep: SweepConfig
    folder: SweepFolder
    broker: Any
    emit: events.OnEvent
    points: Mapping[str, Point]
    contents: Contents
    work: Work = run_trial

    def planned(self, config: Mapping[str, Any]) -> PlannedTrial:
        """Return the trial that Tune requests."""
        point = self.points[config["trial"]] if "trial" in config else point_of(self.sweep, config)
        return PlannedTrial.of(experiment_at(self.sweep, point), point, self.contents)

    def planned_with(self, config: Mapping[str, Any], loaded: Mapping[str, Any]) -> PlannedTrial | None:
        """Return the trial of a suggestion; None if its data are not among the loaded ones, by ``splits_key``."""
        point = point_of(self.sweep, config)
        return self.planned(config) if splits_key(experiment_at(self.sweep, point)) in loaded else None

    def name_of(self, config: Mapping[str, Any]) -> str:
        """Return its name."""
        return str(config["trial"]) if "trial" in config else self.planned(config).name


def selection(sweep: SweepConfig) -> SelectionRecord | None:
    """Return how a sweep's settings were chosen, as recorded in its results."""
    return None if sweep.select is None else SelectionRecord.model_validate(sweep.select.model_dump(mode="json"))


def use_resources(cpus: float, gpus: float) -> None:
    """Restrict this process to its reserved resources."""
    from mea_ray.training.device import use_gpus, use_threads

    use_threads(cpus)
    use_gpus(gpus)


def tune_trial(config: dict[str, Any], *, context: TrialContext, data: Mapping[str, Any]) -> None:
    """Run one trial under Ray Tune.

    A permanent error ends the trial at once: its reason is saved, and Tune does not retry it. After a killed process of
    the trial or of its attack, a lost service, or a lack of GPU memory, Tune retries the trial, up to ``max_failures``
    times.

    Args:
        config: Tune's config: the trial's name, or a suggestion of an adaptive search.
        context: What all trials share.
        data: References to the loaded data, by name.
    """
    import ray
    from ray import tune
    from ray.exceptions import RayError

    from mea_ray.training.device import device_memory

    # This process runs one trial after the other; the next waits until a stopped one has released its service.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"
    role = context.sweep.base.resources.trial
    use_resources(role.cpus, role.gpus)
    trial = context.planned(config)

    def load() -> Splits:
        # Mapped from the object store, not copied; only a search that varies the data itself has to load here.
        shared: SharedData = ray.get(data[trial.splits]) if trial.splits in data else SharedData(trial.config, None)
        return shared.open()

    context.folder.be_patient(context.sweep.base.resources.storage_patience_s, context.emit)

    reports = Reports(tune.report, context.sweep.search, epochs=context.sweep.scheduler.reports == "epoch")
    tools = Tools(context.folder, context.broker, context.emit, reports, selection(context.sweep), context.sweep.keep)
    try:
        with device_memory("a step of the trial"):
            context.work(trial, load, tools, os.getpid(), ray.get_runtime_context().get_node_id())
    except (ServiceUnavailable, StorageUnavailable, AttackDied, DeviceOutOfMemory, RayError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        context.folder.trial(trial.name).save_error(reason, traceback.format_exc())
        reports.rung(dict.fromkeys(METRICS, float("nan")))


@dataclass(frozen=True)
class SharedData:
    """The data of an experiment as the processes of a sweep pass them on.

    Attributes:
        config: The experiment.
        splits: Its data; None if they are mapped from files, which each process opens on its own machine.
    """

    config: ExperimentConfig
    splits: Splits | None

    def open(self) -> Splits:
        """Return the data.

        Raises:
            DataError: They are mapped, and not at hand on this machine.
        """
        return load_splits(self.config) if self.splits is None else self.splits


def load_data(config: ExperimentConfig) -> SharedData:
    """Load and split data; as a task, its result is in the object store once for all, unless the data are mapped."""
    data = load_splits(config)
    parts = (data.victim_train, data.victim_validation, data.thief_pool, data.verification, data.test)
    return SharedData(config, None if any(is_mapped(part.images) for part in parts) else data)


def train_model(
    role: Role, trial: PlannedTrial, index: int, data: SharedData, folder: SweepFolder, emit: events.OnEvent
) -> None:
    """Train one victim or null model into the storage unless it exists.

    Args:
        role: What it is.
        trial: A trial that uses it.
        index: Index of the null model.
        data: Its data.
        folder: The sweep's folder.
        emit: Where events go.
    """
    from mea_ray.experiment.model_sources import StoredModels
    from mea_ray.training.device import device_memory

    config = trial.config
    use_resources(config.resources.victim.cpus, config.resources.victim.gpus)
    folder.be_patient(config.resources.storage_patience_s, emit)
    store = Store(folder.storage, warn=lambda text: emit(events.Warned(text)))
    models = StoredModels(store, config, data.open(), trial.names, epoch_events(config.victim.training.epochs, emit))
    with device_memory("training a model"):
        path = models.victim_folder() if role == "victim" else models.null_folder(index)
    emit(events.ModelReady(role, path.name, str(path)))
