"""The data of a sweep: each loaded once into Ray's object store, checked against its experiments, known by content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mea_ray.core.errors import ConfigError, DataError, MeaRayError
from mea_ray.core.types import Splits
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import Contents, Fingerprints, load_splits, splits_key
from mea_ray.sweep.plan import Draft
from mea_ray.sweep.trainable import load_data


@dataclass(frozen=True)
class Loaded:
    """Data in Ray's object store.

    Attributes:
        references: References to the splits, by ``data.splits_key``.
        contents: Fingerprints of what was read.
    """

    references: Mapping[str, Any]
    contents: Contents


def load(ray: Any, drafts: Sequence[Draft], known: Contents) -> Loaded:
    """Load the data of some experiments, each in a task of its own, and check every experiment against its data.

    Args:
        ray: The ``ray`` module, connected.
        drafts: The experiments.
        known: Fingerprints of data that need not be loaded; those of loaded data take their place.

    Raises:
        ConfigError: An experiment cannot be run.
        DataError: Data cannot be read.
    """
    first = {splits_key(each.config): each for each in reversed(drafts)}
    references = {
        key: ray.remote(load_data).options(num_cpus=each.config.resources.victim.cpus).remote(each.config)
        for key, each in first.items()
    }
    contents = Contents(known.known)
    data = {}
    for key, reference in references.items():
        data[key] = result_of(ray, reference)
        contents.learn(first[key].config, Fingerprints.of(data[key]))
    check_all(drafts, data.__getitem__)
    return Loaded(references, contents)


def load_here(drafts: Sequence[Draft]) -> Contents:
    """Load the data of some experiments one after the other in this process, and check every experiment against them.

    Errors as ``load``.
    """
    contents = Contents()
    for each in drafts:
        contents.of(each.config)
    data: dict[str, Splits] = {}

    def splits(key: str) -> Splits:
        if key not in data:
            data.clear()  # one at a time
            data[key] = load_splits(next(each.config for each in drafts if splits_key(each.config) == key))
        return data[key]

    check_all(drafts, splits)
    return contents


def check_all(drafts: Sequence[Draft], data: Callable[[str], Splits]) -> None:
    """Check every experiment against its data.

    Args:
        drafts: The experiments; those with the same data follow on each other where that helps.
        data: Gives the splits of a ``data.splits_key``.

    Raises:
        ConfigError: One cannot be run; the message names its point.
    """
    for each in sorted(drafts, key=lambda draft: splits_key(draft.config)):
        try:
            check(each.config, data(splits_key(each.config)))
        except (ConfigError, DataError) as error:
            raise type(error)(f"trial at {each}: {error}") from None


def result_of(ray: Any, reference: Any) -> Any:
    """Return a task's result; an error of ours is raised as itself, not wrapped in Ray's."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MeaRayError):
            raise error.cause from None
        raise
