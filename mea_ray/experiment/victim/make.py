"""Makes a victim with its card from an experiment, or from the artifact of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mea_ray.config import Choice, DataChoice, ExperimentConfig, build, load_stored
from mea_ray.core.errors import ArtifactError
from mea_ray.core.settings import Settings
from mea_ray.core.types import Splits
from mea_ray.experiment import artifacts
from mea_ray.experiment.answers import served, stored_key
from mea_ray.experiment.checks import check_owner
from mea_ray.experiment.data import Fingerprints, load_owners_part
from mea_ray.experiment.model_sources import StoredModels
from mea_ray.experiment.names import Names, victim_name
from mea_ray.experiment.ports import OnEpoch
from mea_ray.experiment.verifier import Verifier
from mea_ray.experiment.victim.card import cost_of_mark
from mea_ray.experiment.victim.folder import Victim
from mea_ray.experiment.victim.records import Card
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport
from mea_ray.storage.files import at_home
from mea_ray.training.checkpoint import load_model
from mea_ray.training.device import threads
from mea_ray.watermarks.base import Key


def make_victim(
    config: ExperimentConfig, name: str = "victim", *, on_epoch: OnEpoch = lambda role, name, epoch: None
) -> Victim:
    """Train the victim of an experiment, or load it from the experiment's storage if it was trained before.

    Args:
        config: The experiment; its thief is not used.
        name: Name of the victim.
        on_epoch: Called after each epoch.

    Raises:
        ConfigError: The victim cannot be trained; nothing was started.
        DataError: The data cannot be read.
    """
    data = load_owners_part(config)
    check_owner(config, data)
    models = StoredModels(
        artifacts.Store(config.storage), config, data, Names.of(config, Fingerprints.of(data, config)), on_epoch
    )
    with threads(config.resources.victim.cpus):
        folder = models.victim_folder()
        model, key = models.victim()
        return _described(config, data, model, key, folder, name)


def victim_of_artifact(folder: Path, name: str = "victim") -> Victim:
    """Return the victim in an artifact of a sweep or of a local run, ``STORAGE/artifacts/victims/NAME``.

    Raises:
        ArtifactError: It is not a victim, or its data have changed since it was trained.
    """
    if not (folder / artifacts.INFO).is_file() or not (folder / "config.yaml").is_file():
        raise ArtifactError(f"{folder} is not the artifact of a victim: {artifacts.INFO} or config.yaml is missing")
    artifacts.check(folder)
    config = load_stored(folder / "config.yaml")
    data = load_owners_part(config)
    if victim_name(config, Fingerprints.of(data, config)) != folder.name:
        raise ArtifactError(f"the data of {folder} have changed since it was trained; restore them, or train again")
    model, _ = load_model(folder)
    with threads(config.resources.victim.cpus):
        return _described(config, data, model, stored_key(folder), folder, name)


def _described(
    config: ExperimentConfig, data: Splits, model: ImageModel, key: Key | None, folder: Path, name: str
) -> Victim:
    report = Verifier(config, data, key).report(served(model, key))
    info = artifacts.read_info(folder)
    before = ModelReport.model_validate(info["before"]) if "before" in info else None
    source_cost, calibration_cost = cost_of_mark(report, [] if before is None else [before])
    card = Card(
        data=config.data.label,
        data_fingerprint=data.fingerprint,
        train_images=len(data.victim_train),
        test_images=len(data.test),
        accuracy=report.accuracy,
        accuracy_before=None if before is None else before.accuracy,
        source_cost=source_cost,
        calibration_cost=calibration_cost,
        watermark=config.victim.watermark.label,
        seconds=float(info.get("seconds", 0.0)),
    )
    return Victim.made(
        name,
        model,
        key,
        anchored(config),
        artifact=folder.name,
        class_names=data.test.class_names,
        card=card,
        report=report,
    )


def anchored(config: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment with absolute paths, so that it can be read from another working directory."""
    changes: dict[str, Any] = {}
    if "://" not in config.storage:
        changes["storage"] = str(at_home(config.storage, "storage").absolute())
    if config.victim.weights is not None:
        changes["victim"] = {"weights": str(at_home(config.victim.weights, "victim.weights").absolute())}
    anchored_data: ExperimentConfig = _with_absolute_data(config)
    return build(ExperimentConfig, anchored_data.over(changes))


def _with_absolute_data(value: Any) -> Any:
    """Return settings in which every dataset, even one inside another component, has absolute paths."""
    if isinstance(value, tuple):
        return tuple(map(_with_absolute_data, value))
    if not isinstance(value, Settings):
        return value
    fields = {name: getattr(value, name) for name in type(value).model_fields}
    fields |= value.params if isinstance(value, Choice) else {}
    changes = {name: _with_absolute_data(each) for name, each in fields.items()}
    if isinstance(value, DataChoice) and "path" in changes:
        changes["path"] = _absolute(changes["path"])
    return value.model_copy(update=changes)


def _absolute(path: Any) -> Any:
    if isinstance(path, tuple):
        return tuple(map(_absolute, path))
    there = isinstance(path, str) and path and Path(path).expanduser().exists()  # not a URL, not a pattern
    return str(Path(path).expanduser().absolute()) if there else path
