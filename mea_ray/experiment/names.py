"""What victims, null models, splits and trials are called: a hash of all that made them, the data's content included.

A name follows from settings and from what was read, never from where it was read: the same images in another folder
give the same victim, and other images under the same path another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from mea_ray.config import ExperimentConfig, Tree, digest, identity
from mea_ray.experiment.data import Fingerprints
from mea_ray.models.weights import fingerprint

SCHEMA = 1
"""Raised when victims of the same settings come out otherwise, whatever their components are."""
_NOT_OF_A_TRIAL = ("storage", "tracking", "resources")
"""Where a trial runs and where its results go."""
_NOT_OF_A_NULL = ("watermark", "weights", "null_training")
"""What null models are trained without."""


@dataclass(frozen=True)
class Names:
    """Names of what an experiment makes and uses.

    Attributes:
        trial: The experiment itself, wherever it runs.
        victim: Its victim.
        nulls: Its null models.
        data: Its splits.
    """

    trial: str
    victim: str
    nulls: tuple[str, ...]
    data: str

    @classmethod
    def of(cls, config: ExperimentConfig, read: Fingerprints) -> Names:
        """Name all of an experiment.

        Args:
            config: Its settings.
            read: Fingerprints of its data.
        """
        return cls(
            trial=trial_name(config, read),
            victim=victim_name(config, read),
            nulls=tuple(null_name(config, read, index) for index in range(config.verification.null_models)),
            data=splits_name(config, read),
        )


def trial_name(config: ExperimentConfig, read: Fingerprints) -> str:
    """Name a trial by its settings and its data, without where it runs and where its results go."""
    settings = {key: value for key, value in identity(config).items() if key not in _NOT_OF_A_TRIAL}
    settings |= {"victim": victim} if (victim := _victim(config)) is not None else {}
    return digest({**settings, "data": read.data, "splits": _splits(config, read)})


def victim_name(config: ExperimentConfig, read: Fingerprints) -> str:
    """Name a victim by all that makes it: data, the owner's splits, the ``victim`` section; nothing of the thief."""
    victim = _victim(config)
    if victim is not None:
        victim = {key: value for key, value in victim.items() if key != "null_training"}
    return digest({**_owners(config, read), "victim": victim or None})


def null_name(config: ExperimentConfig, read: Fingerprints, index: int) -> str:
    """Name the ``index``-th null model: as the victim, but whatever the victim's watermark and weights are."""
    victim = {key: value for key, value in identity(config).get("victim", {}).items() if key not in _NOT_OF_A_NULL}
    if config.victim.null_training is not None:
        victim = {key: value for key, value in victim.items() if key != "training"}
        victim |= {"training": own} if (own := identity(config.victim.null_training)) else {}
    return digest({**_owners(config, read), "victim": victim, "null": index})


def _victim(config: ExperimentConfig) -> Tree | None:
    """Return the victim's identity, with the content of its weights in place of where they are."""
    victim: Tree | None = identity(config).get("victim")
    if victim is None or config.victim.weights is None:
        return victim
    return {**victim, "weights": fingerprint(config.victim.weights)}


def splits_name(config: ExperimentConfig, read: Fingerprints) -> str:
    """Name the split data: trials with the same name can share them."""
    return digest({"data": read.data, "splits": _splits(config, read), "seed": config.victim.seed})


def _splits(config: ExperimentConfig, read: Fingerprints) -> Tree:
    """Return the settings of the splits, with the content of the pool in place of where it is."""
    splits = identity(config.splits)
    return splits if read.pool is None else {**splits, "thief_pool": {"content": read.pool}}


def _owners(config: ExperimentConfig, read: Fingerprints) -> Tree:
    """Return what decides which images the owner trains on."""
    named = {"validation_fraction"}
    if config.splits.thief_pool == "disjoint":
        named |= {"thief_pool", "disjoint_fraction"}
    splits = {key: value for key, value in identity(config.splits).items() if key in named}
    return {"schema": SCHEMA, "data": read.data, "splits": splits}
