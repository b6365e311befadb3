"""The data of a sweep: each loaded once into Ray's object store, checked against its experiments, and fingerprinted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, Splits
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import Contents, Fingerprints, dataset_key, pool_choice, split, splits_key
from mea_ray.sweep.plan import Draft
from mea_ray.sweep.tasks import Tasks
from mea_ray.sweep.trainable import load_data


@dataclass(frozen=True)
class Loaded:
    """Data in Ray's object store.

    Attributes:
        references: References to the splits, as ``SharedData``, by ``data.splits_key``.
        contents: Fingerprints of what was read.
    """

    references: Mapping[str, Any]
    contents: Contents


def load(ray: Any, drafts: Sequence[Draft], known: Contents, warn: Callable[[str], None]) -> Loaded:
    """Load the data of some experiments, each in its own task, and check every experiment against its data.

    Args:
        ray: The ``ray`` module, connected.
        drafts: The experiments.
        known: Fingerprints of data that need not be loaded; updated with those of loaded data.
        warn: Called with a message when a machine ran out of memory and the data are loaded again.

    Raises:
        OutOfMemory: Some data did not fit in the memory of a machine.
        ConfigError: An experiment cannot be run.
        DataError: Data cannot be read.
    """
    first = {splits_key(each.config): each for each in reversed(drafts)}
    tasks, references = Tasks(warn), {}
    for key, each in first.items():
        task = ray.remote(load_data).options(num_cpus=each.config.resources.victim.cpus)
        tasks.add(key, f"loading data {each.config.data.label}", partial(task.remote, each.config))
    for key, reference, error in tasks.results():
        if error is not None:
            tasks.cancel()
            raise error
        references[key] = reference
    contents = Contents(known.known)
    data = {}
    for key in first:
        data[key] = ray.get(references[key]).open()
        contents.learn(first[key].config, Fingerprints.of(data[key], first[key].config))
    for each in drafts:
        check_one(each, data[splits_key(each.config)])
    return Loaded(references, contents)


def load_here(
    drafts: Sequence[Draft], visit: Callable[[ExperimentConfig, Splits], None] = lambda config, data: None
) -> tuple[Contents, list[str]]:
    """Load the data of some experiments one after the other in this process, and check the experiments against them.

    Args:
        drafts: The experiments.
        visit: Called with every experiment that passed and its data, while they are in memory.

    Returns:
        Fingerprints of the data, made up for data that could not be loaded; and for each of those the reason.

    Raises:
        ConfigError: An experiment cannot be run.
        DataError: Data do not fit an experiment.
    """
    contents, unread = Contents(), list[str]()
    loaded: dict[str, Dataset] = {}
    ordered = sorted(drafts, key=lambda each: (dataset_key(each.config.data), splits_key(each.config)))
    for _, group in itertools.groupby(ordered, key=lambda each: splits_key(each.config)):
        same = list(group)
        try:
            data = _load_one(same[0].config, loaded)
        except _Unreadable as error:
            unread.append(str(error))
            contents.make_up(same[0].config)
            continue
        contents.learn(same[0].config, Fingerprints.of(data, same[0].config))
        for each in same:
            check_one(each, data)
            visit(each.config, data)
    return contents, list(dict.fromkeys(unread))


class _Unreadable(Exception):
    """A dataset cannot be loaded on this machine."""


def _load_one(config: ExperimentConfig, loaded: dict[str, Dataset]) -> Splits:
    """Load and split the data of an experiment; data loaded for another one stay in memory only if needed."""
    pool = pool_choice(config)
    wanted = {dataset_key(choice): choice for choice in (config.data, pool) if choice is not None}
    for key in set(loaded) - set(wanted):
        del loaded[key]
    try:
        loaded |= {key: choice.build() for key, choice in wanted.items() if key not in loaded}
    except DataError as error:
        raise _Unreadable(str(error)) from None
    return split(config, loaded[dataset_key(config.data)], None if pool is None else loaded[dataset_key(pool)])


def check_one(draft: Draft, data: Splits) -> None:
    """Check an experiment against its data.

    Raises:
        ConfigError: It cannot be run; the message names its point.
        DataError: The data do not fit it.
    """
    try:
        check(draft.config, data)
    except (ConfigError, DataError) as error:
        raise type(error)(f"trial at {draft}: {error}") from None
