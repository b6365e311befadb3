"""The data of a sweep: each loaded once into Ray's object store, checked against its experiments, known by content."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mea_ray.config import DataChoice
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
        references: References to the splits, by ``data.splits_key``.
        contents: Fingerprints of what was read.
    """

    references: Mapping[str, Any]
    contents: Contents


def load(ray: Any, drafts: Sequence[Draft], known: Contents, warn: Callable[[str], None]) -> Loaded:
    """Load the data of some experiments, each in a task of its own, and check every experiment against its data.

    Args:
        ray: The ``ray`` module, connected.
        drafts: The experiments.
        known: Fingerprints of data that need not be loaded; those of loaded data take their place.
        warn: Called with a sentence when a machine ran out of memory and the data are loaded again.

    Raises:
        OutOfMemory: Some data did not fit into the memory of a machine.
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
        data[key] = ray.get(references[key])
        contents.learn(first[key].config, Fingerprints.of(data[key]))
    for each in drafts:
        check_one(each, data[splits_key(each.config)])
    return Loaded(references, contents)


def load_here(drafts: Sequence[Draft]) -> tuple[Contents, list[str]]:
    """Load the data of some experiments one after the other in this process, and check the experiments against them.

    Args:
        drafts: The experiments.

    Returns:
        Fingerprints of the data, made up where they could not be loaded; and for each such dataset why.

    Raises:
        ConfigError: An experiment cannot be run.
        DataError: Data do not fit an experiment.
    """
    contents, unread = Contents(), list[str]()
    loaded: dict[str, Dataset] = {}

    def dataset(choice: DataChoice) -> Dataset:
        key = dataset_key(choice)
        if key not in loaded:
            loaded[key] = choice.build()
        return loaded[key]

    ordered = sorted(drafts, key=lambda each: (dataset_key(each.config.data), splits_key(each.config)))
    for _, group in itertools.groupby(ordered, key=lambda each: splits_key(each.config)):
        same = list(group)
        config, pool = same[0].config, pool_choice(same[0].config)
        wanted = [config.data] if pool is None else [config.data, pool]
        for key in set(loaded) - set(map(dataset_key, wanted)):
            del loaded[key]  # no more at once than an experiment needs
        try:
            read = [dataset(choice) for choice in wanted]
        except DataError as error:
            unread.append(str(error))
            contents.make_up(config)
            continue
        data = split(config, read[0], read[1] if len(read) > 1 else None)
        contents.learn(config, Fingerprints.of(data))
        for each in same:
            check_one(each, data)
    return contents, list(dict.fromkeys(unread))


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
