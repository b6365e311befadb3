"""Sources of the owner's models: the artifacts of a storage, trained once for all users, or memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mea_ray.attacks.base import Rung
from mea_ray.config import ExperimentConfig, Tree
from mea_ray.core.types import Splits
from mea_ray.experiment.answers import stored_key
from mea_ray.experiment.artifacts import Store
from mea_ray.experiment.commitment import Committed, committed
from mea_ray.experiment.encoders import probe_set, with_probe
from mea_ray.experiment.names import Names
from mea_ray.experiment.owner import TrainedModel, draw_key, repeatable_key, train_null, train_victim
from mea_ray.experiment.ports import OnEpoch, Role, StealSome
from mea_ray.experiment.stolen_nulls import StolenNulls
from mea_ray.models.base import ImageModel
from mea_ray.training.checkpoint import DESCRIPTION, WEIGHTS, load_model, save_model
from mea_ray.training.snapshot import Snapshots
from mea_ray.watermarks.base import Key

KINDS: dict[Role, str] = {"victim": "victims", "null": "nulls"}
"""Folder of a role's artifacts."""


class StoredModels:
    """The models of an experiment as artifacts in a storage; implements ``ports.Models``.

    Args:
        store: The artifacts.
        config: The experiment.
        data: Its data.
        names: Its names.
        on_epoch: Called after each epoch of a model that this process trains.
    """

    def __init__(
        self,
        store: Store,
        config: ExperimentConfig,
        data: Splits,
        names: Names,
        on_epoch: OnEpoch = lambda role, name, record: None,
    ) -> None:
        self.store, self.config, self.data, self.names, self._on_epoch = store, config, data, names, on_epoch
        self._folders: dict[str, Path] = {}

    def prepare(self) -> None:
        """Train all models that are not in the storage."""
        self.victim_folder()
        for index in range(len(self.names.nulls)):
            self.null_folder(index)

    def victim(self) -> tuple[ImageModel, Key | None]:
        """Load the victim and its key; train it first if it does not exist."""
        folder = self.victim_folder()
        return self._load(folder), stored_key(folder)

    def committed(self) -> Committed | None:
        """Return the commitment to the victim's key, from its folder, checked.

        Raises:
            ArtifactError: It is not to this victim and this key, or its time stamp is invalid.
        """
        return committed(self.victim_folder())

    def null(self, index: int) -> ImageModel:
        """Load a null model; train it first if it does not exist."""
        return self._load(self.null_folder(index))

    def stolen_nulls(self, wanted: Mapping[int, Collection[int]], steal: StealSome) -> Iterator[tuple[int, Rung]]:
        """Yield substitutes of null models, stolen once for all trials with the same thief."""
        return self._stolen.take(wanted, steal)

    def drop_stolen_nulls(self) -> None:
        """Remove the substitutes of null models; other trials that need them steal them again."""
        self._stolen.drop()

    @property
    def _stolen(self) -> StolenNulls:
        return StolenNulls(self.store, self.config, self.names, self.null)

    def victim_folder(self) -> Path:
        """Return the victim's folder; the first process that calls this trains it, the others wait."""
        name = self.names.victim

        def train(on_epoch: Callable[[Tree], None], snapshots: Snapshots) -> TrainedModel:
            return train_victim(self.config, self.data, on_epoch, self._drawn_key(), snapshots)

        return self._folder("victim", name, train)

    def _drawn_key(self) -> Key | None:
        """Draw a key that cannot be drawn again and save it before training starts, or load the saved one.

        So an interrupted training, or a damaged victim that is trained again, has the same key.
        """
        if repeatable_key(self.config):
            return None
        storage, relative = self.store.storage, f"keys/{self.names.victim}"
        folder = storage.path(relative)
        if not storage.pull(relative, last="key.json"):
            key = draw_key(self.config, self.data)
            if key is None:
                return None
            folder.mkdir(mode=0o700, exist_ok=True)
            key.save(folder)
            storage.push(relative, last="key.json")
        return Key.load(folder)

    def null_folder(self, index: int) -> Path:
        """Return the folder of the ``index``-th null model; otherwise as ``victim_folder``."""
        name = self.names.nulls[index]

        def train(on_epoch: Callable[[Tree], None], snapshots: Snapshots) -> TrainedModel:
            return train_null(self.config, self.data, index, on_epoch, snapshots)

        return self._folder("null", name, train, index=index)

    def _folder(
        self, role: Role, name: str, train: Callable[[Callable[[Tree], None], Snapshots], TrainedModel], **info: Any
    ) -> Path:
        def write(folder: Path) -> Tree:
            every_s = self.config.resources.snapshot_every_s
            snapshots = Snapshots(self.store.storage, states, every_s, self.store.warn)
            made = train(lambda record: self._on_epoch(role, name, record), snapshots)
            save_model(folder, made.model, {"role": role, "name": name, "probe": _probe(self.config)})
            if made.key is not None:
                made.key.save(folder)
            return {**info, **made.info}

        if name not in self._folders:
            needed, states = (WEIGHTS, DESCRIPTION), f"artifacts/states/{KINDS[role]}-{name}"
            self._folders[name] = self.store.get_or_make(KINDS[role], name, self.config, write, needed)
            Snapshots(self.store.storage, states).remove()
        return self._folders[name]

    def _load(self, folder: Path) -> ImageModel:
        """Load a model; refit an encoder's head if an experiment with another reading has trained it."""
        model, info = load_model(folder)
        if info.get("probe") == _probe(self.config):
            return model
        return with_probe(self.config, probe_set(self.config, self.data), model)


class TrainedModels:
    """The models of an experiment in memory, trained on first use; implements ``ports.Models``.

    Args:
        config: The experiment.
        data: Its data.
        names: Its names.
        on_epoch: Called after each epoch.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        data: Splits,
        names: Names,
        on_epoch: OnEpoch = lambda role, name, record: None,
    ) -> None:
        self.config, self.data, self.names, self._on_epoch = config, data, names, on_epoch
        self._victim: TrainedModel | None = None
        self._nulls: dict[int, ImageModel] = {}

    def prepare(self) -> None:
        """Train all models."""
        self.victim()
        for index in range(len(self.names.nulls)):
            self.null(index)

    def victim(self) -> tuple[ImageModel, Key | None]:
        """Return the victim and its key."""
        if self._victim is None:
            name = self.names.victim
            self._victim = train_victim(self.config, self.data, lambda epoch: self._on_epoch("victim", name, epoch))
        return self._victim.model, self._victim.key

    def committed(self) -> None:
        """Return None: there is no commitment to a key in memory."""

    def null(self, index: int) -> ImageModel:
        """Return a null model."""
        if index not in self._nulls:
            name = self.names.nulls[index]
            trained = train_null(self.config, self.data, index, lambda epoch: self._on_epoch("null", name, epoch))
            self._nulls[index] = trained.model
        return self._nulls[index]

    def stolen_nulls(self, wanted: Mapping[int, Collection[int]], steal: StealSome) -> Iterator[tuple[int, Rung]]:
        """Yield substitutes of null models."""
        budgets, at_once = set(self.config.thief.budgets), self.config.thief.training.stack
        for start in range(0, len(wanted), at_once):
            indices = list(wanted)[start : start + at_once]
            skips = [budgets - set(wanted[index]) for index in indices]
            for place, rung in steal(list(map(self.null, indices)), [None] * len(indices), skips):
                yield indices[place], rung


def _probe(config: ExperimentConfig) -> Tree | None:
    """Return how the head of an encoder was fitted; None for a classifier, whose head belongs to it."""
    if not config.encodes:
        return None
    return {"reading": config.verification.reading, "images": config.verification.probe_images}
