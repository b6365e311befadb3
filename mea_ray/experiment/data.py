"""The data of an experiment: loaded by its config, split among owner, thief and verifier, fingerprinted by content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mea_ray.config import Choice, DataChoice, ExperimentConfig, digest
from mea_ray.config.class_names import build_data
from mea_ray.core.errors import DataError
from mea_ray.core.seeding import derive
from mea_ray.core.settings import Settings
from mea_ray.core.types import Dataset, Splits


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of the content that was read for an experiment, whatever its paths.

    Attributes:
        data: ``Dataset.fingerprint`` of the victim's dataset.
        pool: That of the thief's own dataset; None if the pool is cut from the victim's.
        inner: Those of datasets that components name (`cfw`, `transfer_learning`), by ``dataset_key``.
    """

    data: str
    pool: str | None = None
    inner: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Splits, config: ExperimentConfig) -> Fingerprints:
        """Return the fingerprints of loaded data; datasets that components name are loaded for theirs.

        Raises:
            DataError: A dataset that a component names cannot be loaded.
        """
        inner = {dataset_key(choice): load_inner(choice).fingerprint for choice in inner_choices(config)}
        return cls(data.fingerprint, data.pool_fingerprint, inner)


class Contents:
    """Fingerprints of datasets by the settings that load them; unknown ones are loaded.

    Args:
        known: Fingerprints by ``dataset_key``.
    """

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self.known = dict(known or {})

    def of(self, config: ExperimentConfig) -> Fingerprints:
        """Return the fingerprints of an experiment's data.

        Raises:
            DataError: A dataset that is not known cannot be loaded.
        """
        pool = pool_choice(config)
        inner = {dataset_key(choice): self._of(choice, load_inner) for choice in inner_choices(config)}
        return Fingerprints(self._of(config.data), None if pool is None else self._of(pool, load_pool), inner)

    def learn(self, config: ExperimentConfig, read: Fingerprints) -> None:
        """Add the fingerprints of an experiment's data, which were loaded elsewhere."""
        self.known[dataset_key(config.data)] = read.data
        if (pool := pool_choice(config)) is not None and read.pool is not None:
            self.known[dataset_key(pool)] = read.pool
        self.known |= read.inner

    def make_up(self, config: ExperimentConfig) -> None:
        """Make up fingerprints for data that cannot be loaded here: different ones for different settings."""
        pool = pool_choice(config)
        for choice in (config.data, *([] if pool is None else [pool]), *inner_choices(config)):
            self.known.setdefault(dataset_key(choice), f"unread-{digest(dataset_key(choice))}")

    def _of(self, choice: DataChoice, load: Callable[[DataChoice], Dataset] = build_data) -> str:
        key = dataset_key(choice)
        if key not in self.known:
            self.known[key] = load(choice).fingerprint
        return self.known[key]


def dataset_key(choice: DataChoice) -> str:
    """Return the settings that load a dataset as a canonical string."""
    return json.dumps(choice.resolved(), sort_keys=True)


def splits_key(config: ExperimentConfig) -> str:
    """Return a string that is equal for experiments whose splits are loaded and cut in the same way."""
    tree = config.resolved()
    return digest({"data": tree["data"], "splits": tree["splits"], "seed": tree["victim"]["seed"]})


def pool_choice(config: ExperimentConfig) -> DataChoice | None:
    """Return the dataset of the thief's pool; None if the pool is cut from the victim's own dataset."""
    pool = config.splits.thief_pool
    return None if isinstance(pool, str) else pool


def inner_choices(config: ExperimentConfig) -> list[DataChoice]:
    """Return the datasets that components of an experiment name, in the order of the config."""
    return [
        each for section in (config.victim, config.thief, config.removal, config.detection) for each in _in(section)
    ]


def _in(value: Any) -> Iterator[DataChoice]:
    if isinstance(value, DataChoice):
        yield value
    elif isinstance(value, Settings):
        inner = {key: getattr(value, key) for key in type(value).model_fields}
        for each in (inner | (value.params if isinstance(value, Choice) else {})).values():
            yield from _in(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _in(each)


def load_inner(choice: DataChoice) -> Dataset:
    """Load a dataset that a component names.

    Raises:
        DataError: It cannot be loaded. The message names the setting, since it would refer to ``data.*`` otherwise.
    """
    return _loaded(choice, "dataset (of a watermark or a removal, whose settings are called data.* here)")


def load_splits(config: ExperimentConfig) -> Splits:
    """Load the datasets of an experiment and split them.

    Raises:
        DataError: A dataset is missing, cannot be read, or is too small to be split.
    """
    pool = pool_choice(config)
    return split(config, build_data(config.data), None if pool is None else load_pool(pool))


def load_pool(choice: DataChoice) -> Dataset:
    """Load the dataset of the thief's pool.

    Raises:
        DataError: It cannot be loaded. The message begins with the setting, since it would refer to ``data.*``
            otherwise.
    """
    return _loaded(choice, "splits.thief_pool (whose settings are called data.* here)")


def _loaded(choice: DataChoice, setting: str) -> Dataset:
    try:
        return build_data(choice)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error


def load_owners_part(config: ExperimentConfig) -> Splits:
    """Load and split only the victim's dataset: the owner's and the verifier's parts, which do not depend on the pool.

    A pool from another dataset is not loaded; ``thief_pool`` is then that of the setting ``train``.
    """
    return split(config, build_data(config.data), None)


def split(config: ExperimentConfig, dataset: Dataset, pool: Dataset | None) -> Splits:
    """Split loaded datasets. The cuts follow from the victim's seed, so that all thieves attack the same victim.

    Args:
        config: The experiment.
        dataset: The victim's dataset.
        pool: The dataset of the thief's pool; None if it is cut from ``dataset``, or not needed.
    """
    from mea_ray.data.splits import make_splits

    named = config.splits.thief_pool
    return make_splits(
        dataset,
        validation_fraction=config.splits.validation_fraction,
        verification_fraction=config.splits.verification_fraction,
        thief_pool=pool if pool is not None else named if isinstance(named, str) else "train",
        disjoint_fraction=config.splits.disjoint_fraction,
        held_out=config.splits.held_out,
        seed=derive(config.victim.seed, "splits"),
    )
