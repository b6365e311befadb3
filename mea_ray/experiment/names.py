"""Names of victims, null models, splits and trials: a hash of everything that determines them, data included.

A name follows from settings and from content, never from paths: the same images in another folder give the same victim,
and other images under the same path give another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mea_ray.config import ExperimentConfig, Tree, digest, identity
from mea_ray.experiment.data import Fingerprints, dataset_key, inner_choices
from mea_ray.storage.files import at_home, refusing, sha256
from mea_ray.watermarks import WATERMARKS

SCHEMA = 1
"""Increased when the same settings give another victim, for all components."""
THEFT_SCHEMA = 1
"""Increased when the same settings give another theft."""
_NOT_OF_A_TRIAL = ("storage", "tracking", "resources")
"""Settings of where a trial runs and where its results go."""
_KEY_FROM_SEED = "insecure_key_from_seed"
_NOT_OF_A_NULL = (_KEY_FROM_SEED, "watermark", "weights", "null_training")
"""Settings of the victim that null models do not have."""


@dataclass(frozen=True)
class Names:
    """Names of everything that an experiment makes and uses.

    Attributes:
        trial: The experiment itself, wherever it runs.
        victim: Its victim.
        nulls: Its null models.
        data: Its splits.
        theft: The theft of a null model: thief, service and data, without the watermark.
    """

    trial: str
    victim: str
    nulls: tuple[str, ...]
    data: str
    theft: str

    @classmethod
    def of(cls, config: ExperimentConfig, read: Fingerprints) -> Names:
        """Compute all names of an experiment.

        Args:
            config: Its settings.
            read: Fingerprints of its data.
        """
        null = _null(config, read)  # once: an experiment may have a thousand null models
        return cls(
            trial=trial_name(config, read),
            victim=victim_name(config, read),
            nulls=tuple(digest({**null, "null": index}) for index in range(config.verification.null_models)),
            data=splits_name(config, read),
            theft=theft_name(config, read),
        )


def trial_name(config: ExperimentConfig, read: Fingerprints) -> str:
    """Name a trial by its settings and its data, without where it runs and where its results go."""
    settings = {key: value for key, value in identity(config).items() if key not in _NOT_OF_A_TRIAL}
    settings["victim"] = _victim(config)
    settings = {key: value for key, value in settings.items() if value is not None}
    settings = _by_content(settings, _inner(config, read))
    return digest({**settings, "data": read.data, "splits": _splits(config, read)})


def victim_name(config: ExperimentConfig, read: Fingerprints) -> str:
    """Name a victim by what determines it: data, the owner's splits, the ``victim`` section; nothing of the thief."""
    victim = _victim(config)
    if victim is not None:
        victim = {key: value for key, value in victim.items() if key != "null_training"}
    tree = {**_owners(config, read), "victim": _by_content(victim or None, _inner(config, read))}
    return digest({**tree, **_filter(config)})


def sample_filter(config: ExperimentConfig) -> str:
    """Return ``verification.filter``, resolved for the scheme; ``none`` without a watermark."""
    if config.victim.watermark.name == "none":
        return "none"
    wanted = config.verification.filter
    scheme = WATERMARKS.resolve(config.victim.watermark.name)
    return str(getattr(scheme, "sample_filter", "none")) if wanted == "auto" else wanted


def _filter(config: ExperimentConfig) -> Tree:
    """Return the settings of the key's sample filter, which belong to the victim's artifact; empty without one."""
    if sample_filter(config) == "none":
        return {}
    section = config.verification
    reading = [section.reading, section.probe_images] if config.encodes else []
    return {"filter": [identity(section.shadow), *reading]}


def null_name(config: ExperimentConfig, read: Fingerprints, index: int) -> str:
    """Name the ``index``-th null model: as the victim, but whatever the victim's watermark and weights are."""
    return digest({**_null(config, read), "null": index})


def _null(config: ExperimentConfig, read: Fingerprints) -> Tree:
    """Return what all null models of an experiment have in common."""
    victim = {key: value for key, value in identity(config).get("victim", {}).items() if key not in _NOT_OF_A_NULL}
    if config.victim.null_training is not None:
        victim = {key: value for key, value in victim.items() if key != "training"}
        victim |= {"training": own} if (own := identity(config.victim.null_training)) else {}
    return {**_owners(config, read), "victim": victim}


def _victim(config: ExperimentConfig) -> Tree | None:
    """Return the victim's identity, with the content of its weights and the source of its key's seed."""
    victim: Tree = dict(identity(config).get("victim", {}))
    # Victims whose key comes from their seed keep the names from when all keys did.
    if not victim.pop(_KEY_FROM_SEED, False) and config.victim.watermark.name != "none":
        victim["key"] = "system"
    if config.victim.weights is not None:
        weights = at_home(config.victim.weights, "victim.weights")
        with refusing(f"victim.weights={weights} cannot be read", "give a file of safetensors or a state dict"):
            victim["weights"] = sha256(weights)
    return victim or None


def splits_name(config: ExperimentConfig, read: Fingerprints) -> str:
    """Name the split data: trials with the same name can share them."""
    return digest({"data": read.data, "splits": _splits(config, read), "seed": config.victim.seed})


def theft_name(config: ExperimentConfig, read: Fingerprints) -> str:
    """Name the theft of a null model; the null model itself has another name."""
    settings = identity(config)
    tree = {key: settings[key] for key in ("thief", "service") if key in settings}
    reading = [config.verification.reading, config.verification.probe_images] if config.encodes else None
    made_by = [splits_name(config, read), _by_content(tree, _inner(config, read)), config.seed, reading]
    return digest([THEFT_SCHEMA, *made_by])


def _inner(config: ExperimentConfig, read: Fingerprints) -> dict[str, str]:
    """Return the content of each dataset that a component names, by the digest of its settings' identity."""
    fingerprints = {digest(identity(choice)): read.inner.get(dataset_key(choice)) for choice in inner_choices(config)}
    return {key: content for key, content in fingerprints.items() if content is not None}


def _by_content(tree: Any, contents: Mapping[str, str]) -> Any:
    """Replace the settings that load datasets by the datasets' content."""
    if not contents:
        return tree
    if isinstance(tree, Mapping):
        content = contents.get(digest(tree))
        if content is not None:
            return {"content": content}
        return {key: _by_content(value, contents) for key, value in tree.items()}
    return [_by_content(each, contents) for each in tree] if isinstance(tree, list) else tree


def _splits(config: ExperimentConfig, read: Fingerprints) -> Tree:
    """Return the settings of the splits, with the content of the pool in place of its location."""
    splits = identity(config.splits)
    return splits if read.pool is None else {**splits, "thief_pool": {"content": read.pool}}


def _owners(config: ExperimentConfig, read: Fingerprints) -> Tree:
    """Return the settings that determine the owner's training images."""
    named = {"validation_fraction"}
    if config.splits.thief_pool == "disjoint":
        named |= {"thief_pool", "disjoint_fraction"}
    splits = {key: value for key, value in identity(config.splits).items() if key in named}
    return {"schema": SCHEMA, "data": read.data, "splits": splits}
