"""Removals within an experiment: who holds what, and what verification says of what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import ExperimentConfig, digest, identity
from mea_ray.core.seeding import derive
from mea_ray.evaluation import metrics
from mea_ray.experiment.checks import Prepared, build_network, settings
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal
from mea_ray.results.records import ModelReport, RemovalResult

Judge = Callable[[nn.Module], ModelReport]


@dataclass(frozen=True)
class Suspect:
    """A model that removals are tried on.

    Attributes:
        load: Gives the model; called only if there is something left to do.
        report: What verification says of it as it is.
    """

    load: Callable[[], ImageModel]
    report: ModelReport


def removals(
    config: ExperimentConfig,
    prepared: Prepared,
    transfer: TransferSet,
    suspects: Mapping[str, Suspect],
    judge: Judge,
    *,
    find: Callable[[str], RemovalResult | None] = lambda name: None,
    keep: Callable[[str, RemovalResult], None] = lambda name, result: None,
) -> list[RemovalResult]:
    """Try every removal of the config on every model that it names.

    Args:
        config: The experiment.
        prepared: Its data.
        transfer: What the thief holds.
        suspects: ``substitute``, ``victim`` and ``null_model`` to the models.
        judge: Verifies what is left.
        find: Gives a result from before, by its name.
        keep: Told each new result and its name.

    Returns:
        One result for each removal and model, removals in the config's order.
    """
    results = []
    held: dict[str, tuple[ImageModel, Holdings]] = {}  # asking a model about all of the thief's images is done once
    for choice in config.removal.methods:
        for on in config.removal.tried_on:
            name = f"{choice.label}-{digest(identity(choice))}-{on}"
            result = find(name)
            if result is None:
                suspect = suspects[on]
                removal: Removal = choice.build()
                if on not in held:
                    model = suspect.load()
                    owner = None if on == "substitute" else model
                    held[on] = model, holdings(config, prepared, transfer, owner)
                started = time.perf_counter()
                left = removal.remove(*held[on], derive(config.seed, "removal"))
                seconds = time.perf_counter() - started
                result = RemovalResult(
                    removal=choice.resolved(),
                    strength=removal.strength,
                    tried_on=on,
                    before=suspect.report,
                    after=judge(left),
                    seconds=seconds,
                )
                keep(name, result)
            results.append(result)
    return results


def holdings(config: ExperimentConfig, prepared: Prepared, transfer: TransferSet, owner: ImageModel | None) -> Holdings:
    """Return what whoever holds a model works with: the thief's images, at his largest budget.

    The answers of the victim's API would carry the mark into a null model, so that a model which its owner changes is
    asked itself. Of a thief who kept no image (a data-free one) it is the pool; his substitute is refused by ``check``.

    Args:
        config: The experiment.
        prepared: Its data.
        transfer: What the thief was answered.
        owner: The model that answers; None are the API's answers.
    """
    pool, budget = prepared.splits.thief_pool.images, config.thief.budgets[-1]
    count = min(budget, len(transfer))
    images = transfer.training_images(pool, count)
    answers = transfer.prefix(count)[1][transfer.for_training(count)]
    if not len(images):
        images = pool[:budget]
    if owner is not None:
        answers = metrics.probabilities(owner, images)
    make_model = partial(build_network, config.thief.model, prepared)
    return Holdings(images, answers, make_model, settings(config.thief.training))
