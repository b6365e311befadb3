"""Null models of one victim, and substitutes of them: trained on Ray, measured with the victim's key, one file each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.calibration.models import owners_models, with_innocents
from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.answers import pass_images, service_policy
from mea_ray.experiment.checks import check, check_owner
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.theft import run_attack
from mea_ray.experiment.verifier import Verifier
from mea_ray.experiment.victim.folder import OWNER, Victim
from mea_ray.experiment.victim.nulls import NullRecord, keep, measured_by, read_nulls, thief_digest, with_cost
from mea_ray.results.records import ModelReport
from mea_ray.storage.files import refusing, try_writing
from mea_ray.storage.remote import Storage
from mea_ray.sweep import cluster
from mea_ray.sweep.modules import modules_to_send
from mea_ray.sweep.tasks import Tasks
from mea_ray.sweep.trainable import use_resources

logger = logging.getLogger(__name__)

OnNull = Callable[[NullRecord, int, int], None]
"""Called with each measured model, how many are done, and how many there will be."""


@dataclass(frozen=True)
class Job:
    """One null model to train, steal and measure in a worker.

    Attributes:
        config: The experiment, with as many null models as are wanted.
        victim: The victim's folder, on a storage that every node sees.
        index: Which null model.
        own: Whether the null model itself is measured.
        budgets: Budgets that it is stolen with; empty for none.
    """

    config: ExperimentConfig
    victim: str
    index: int
    own: bool
    budgets: tuple[int, ...]


def make_nulls(
    victim: Victim,
    count: int,
    *,
    stolen: int = 0,
    config: ExperimentConfig | None = None,
    address: str | None = None,
    on_null: OnNull = lambda record, done, of: None,
) -> Victim:
    """Train null models of a victim, steal some of them, and measure all with the victim's key.

    Nothing is measured twice, and models that a sweep trained in the same storage are reused. The victim's card then
    says what the mark costs in comparison.

    Args:
        victim: The victim, with its folder.
        count: Null models in all.
        stolen: How many of them are stolen as well, with each of the config's budgets.
        config: The experiment with another thief or other places of its data; the victim's when None.
        address: Ray cluster, ``host:port`` or ``auto``; None starts one on this machine.
        on_null: Called with each measured model.

    Returns:
        The victim with its new card.

    Raises:
        ConfigError: The numbers do not fit, or the null models or their thief could not be trained.
        DataError: The data are not at hand.
    """
    if not 0 <= stolen <= count or count < 1:
        raise ConfigError(f"count={count} must be at least 1, and stolen={stolen} lie between 0 and count")
    address = cluster.check_address(address)
    config = with_innocents(config or victim.config, count)
    if config.victim.weights is not None and config.victim.null_training is None:
        raise ConfigError(
            "null models start from fresh weights; say how they are trained, e.g. victim.null_training.epochs=60"
        )
    with refusing(f"{victim.folder} cannot be written", "copy the victim's folder to another place"):
        try_writing(victim.require_folder() / OWNER)
    Storage(config.storage).check_writable()
    data = load_splits(config) if stolen else None
    if data is not None:
        check(config, data)
    jobs = left_to_do(victim, config, count, stolen)
    total = count + stolen * len(config.thief.budgets)
    done = total - sum(job.own + len(job.budgets) for job in jobs)
    if jobs:
        py_modules = modules_to_send(config.resolved(), config.resources.py_modules, address)
        with cluster.quiet(), cluster.ray_cluster(address, py_modules) as ray:
            for records in _run(ray, config, jobs):
                for record in records:
                    keep(victim, record)
                    done += 1
                    on_null(record, done, total)
    return with_cost(victim)


def left_to_do(victim: Victim, config: ExperimentConfig, count: int, stolen: int) -> list[Job]:
    """Return a job for each null model of which something is not measured yet, by index.

    Args:
        victim: The victim, with its folder.
        config: The experiment.
        count: Null models in all.
        stolen: How many of them are stolen as well: the first ones.
    """
    known = {(record.index, record.budget, record.thief) for record in read_nulls(victim)}
    thief, folder = thief_digest(config), str(victim.require_folder())
    jobs = []
    for index in range(count):
        wanted = config.thief.budgets if index < stolen else ()
        budgets = tuple(budget for budget in wanted if (index, budget, thief) not in known)
        own = (index, None, "") not in known
        if own or budgets:
            jobs.append(Job(config, folder, index, own, budgets))
    return jobs


def _run(ray: Any, config: ExperimentConfig, jobs: list[Job]) -> Iterator[list[NullRecord]]:
    reserved = config.resources.victim
    remote = ray.remote(measured).options(num_cpus=reserved.cpus, num_gpus=reserved.gpus, max_retries=2)
    tasks = Tasks(logger.warning)
    for job in jobs:
        tasks.add(str(job.index), f"training and measuring null model {job.index}", partial(remote.remote, job))
    try:
        for _, reference, error in tasks.results():
            if error is not None:
                raise error
            yield ray.get(reference)
    except BaseException:
        tasks.cancel()
        raise


def measured(job: Job) -> list[NullRecord]:
    """Train, steal and measure one null model; this is what runs in a worker."""
    config = job.config
    use_resources(config.resources.victim.cpus, config.resources.victim.gpus)
    victim, data = Victim.load(job.victim), load_splits(config)
    check_owner(config, data)
    model = owners_models(config, data).null(job.index)
    verifier = Verifier(config, data, victim.key)
    labels = verifier.predictions(victim.model)
    made_by = measured_by(victim)
    records = []
    if job.own:
        records.append(NullRecord(made_by=made_by, index=job.index, report=verifier.report(model, victim=labels)))
    if job.budgets:
        thief = config.model_copy(update={"thief": config.thief.changed(budgets=job.budgets), "seed": config.seed})
        blackbox = LocalBlackBox(model, service_policy(config, data, model, None), pass_images=pass_images(config))
        for rung in run_attack(thief, data, blackbox):
            report: ModelReport = verifier.report(rung.model, victim=labels)
            records.append(
                NullRecord(
                    made_by=made_by,
                    index=job.index,
                    report=report,
                    budget=rung.budget,
                    thief=thief_digest(config),
                    attack=config.thief.attack.label,
                )
            )
    return records
