"""The models of a calibration: innocent and watermarked ones, and substitutes that the config's thief makes of them.

All of this runs in workers. Finished models are in the storage and are not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.calibration import forger
from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ArtifactError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Splits
from mea_ray.experiment.answers import pass_images, service_policy
from mea_ray.experiment.artifacts import Store
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.model_sources import StoredModels
from mea_ray.experiment.names import Names
from mea_ray.experiment.theft import run_attack
from mea_ray.models.base import ImageModel
from mea_ray.results.records import read_record
from mea_ray.storage.files import PATIENCE, write_whole
from mea_ray.storage.remote import Storage
from mea_ray.sweep.trainable import use_resources
from mea_ray.training.checkpoint import DESCRIPTION, check_model, load_model, save_model
from mea_ray.watermarks.base import Key


class Forged(BaseModel):
    """The success rates of a forger on one innocent model.

    Attributes:
        rates: The best rate of each pair of classes, (classes, classes); None where there is nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rates: list[list[float | None]]

    @property
    def best(self) -> float:
        """The largest success rate of the forger."""
        return max((value for row in self.rates for value in row if value is not None), default=0.0)


@dataclass(frozen=True)
class Folder:
    """Where a calibration stores its models and measurements.

    Attributes:
        storage: The storage.
        relative: The calibration's folder in it.
    """

    storage: Storage
    relative: str

    @property
    def path(self) -> Path:
        """The calibration's folder on this machine."""
        return self.storage.root / self.relative

    def stolen(self, role: str, index: int, budget: int) -> str:
        """Return the folder, in the storage, of the substitute of the ``index``-th model of a role."""
        return f"{self.relative}/stolen/{role}-{index:03d}/{budget}"

    def substitute(self, role: str, index: int, budget: int) -> ImageModel | None:
        """Load a substitute; None if there is none yet, or it is damaged."""
        relative = self.stolen(role, index, budget)
        self.storage.pull(relative, last=DESCRIPTION)
        try:
            check_model(self.storage.root / relative)
            return load_model(self.storage.root / relative)[0]
        except ArtifactError:
            return None


def seeded(config: ExperimentConfig, index: int) -> ExperimentConfig:
    """Return the experiment with the ``index``-th victim's seed: another key, other splits, weights and batches."""
    victim = config.victim.model_copy(update={"seed": config.victim.seed + index})
    return config.model_copy(update={"victim": victim})


def with_innocents(config: ExperimentConfig, count: int) -> ExperimentConfig:
    """Return the experiment with ``count`` null models."""
    changed = config.verification.changed(null_models=count, stolen_null_models=0)
    return config.model_copy(update={"verification": changed})


def owners_models(config: ExperimentConfig, data: Splits) -> StoredModels:
    """Return victim and null models of an experiment, in its storage."""
    return StoredModels(Store(config.storage), config, data, Names.of(config, Fingerprints.of(data, config)))


def make_innocent(config: ExperimentConfig, relative: str, index: int, stolen: bool) -> None:
    """Train the ``index``-th innocent model, forge marks in it, and steal it.

    Args:
        config: The experiment, with as many null models as are wanted.
        relative: The calibration's folder in the storage.
        index: Which innocent model.
        stolen: Whether it is stolen.
    """
    use_resources(config.resources.victim.cpus, config.resources.victim.gpus)
    data, folder = load_splits(config), Folder(Storage(config.storage), relative)
    model = owners_models(config, data).null(index)
    path = forged_file(folder, index)
    if read_record(Forged, path) is None:
        best = forger.best_of_pairs(forger.forge(model, data.verification, seed=derive(config.seed, "forger")))
        rates = [[None if np.isnan(value) else float(value) for value in row] for row in best]
        write_whole(path, Forged(rates=rates).model_dump_json())
        folder.storage.push(path.relative_to(folder.storage.root).as_posix())
    if stolen:
        steal(config, data, model, None, folder, index)


def make_marked(config: ExperimentConfig, relative: str, index: int) -> None:
    """Train the ``index``-th watermarked model and steal it; arguments as for ``make_innocent``."""
    use_resources(config.resources.victim.cpus, config.resources.victim.gpus)
    own = seeded(config, index)
    data, folder = load_splits(own), Folder(Storage(config.storage), relative)
    model, key = owners_models(own, data).victim()
    steal(own, data, model, key, folder, index)


def steal(
    config: ExperimentConfig, data: Splits, model: ImageModel, key: Key | None, folder: Folder, index: int
) -> None:
    """Steal a model with each budget of the config, by a thief with a seed of its own.

    Args:
        config: The experiment.
        data: Its data.
        model: The model behind the query API.
        key: The owner's key; None for an innocent model.
        folder: Where the substitutes are kept.
        index: Which model of its kind.
    """
    role = "innocent" if key is None else "marked"
    budgets = config.thief.budgets
    done = {budget for budget in budgets if folder.substitute(role, index, budget) is not None}
    if len(done) == len(budgets):
        return
    thief = config.model_copy(update={"seed": config.seed + index})
    answers = f"{folder.relative}/unfinished/{role}-{index:03d}"
    transfer = TransferSet(
        folder.storage.root / answers, snapshot_every_s=config.resources.snapshot_every_s, on_damage=PATIENCE.notify
    )
    blackbox = LocalBlackBox(model, service_policy(config, data, model, key), pass_images=pass_images(config))
    for rung in run_attack(thief, data, blackbox, transfer, skip=done):
        assert isinstance(rung.model, ImageModel)
        relative = folder.stolen(role, index, rung.budget)
        save_model(folder.storage.root / relative, rung.model, {"role": f"stolen {role}", "index": index})
        folder.storage.push(relative, last=DESCRIPTION)
    folder.storage.delete(answers)


def substitutes(
    config: ExperimentConfig, folder: Folder, role: str, indices: range
) -> Iterator[tuple[int, int, ImageModel]]:
    """Load the substitutes of models of a role: index, budget and network.

    Raises:
        ArtifactError: One is missing.
    """
    for index in indices:
        for budget in config.thief.budgets:
            model = folder.substitute(role, index, budget)
            if model is None:
                relative = folder.stolen(role, index, budget)
                raise ArtifactError(f"{relative} is missing or damaged; start the calibration again")
            yield index, budget, model


def forged_file(folder: Folder, index: int) -> Path:
    """Return the file of the forger's success rates on the ``index``-th innocent model."""
    return folder.path / "forged" / f"innocent-{index:03d}.json"
