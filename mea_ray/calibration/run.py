"""Many innocent and many watermarked models in parallel on Ray, each verified once; what is done is on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from mea_ray.calibration import forger as forging
from mea_ray.calibration.separation import Separation, separations
from mea_ray.calibration.thresholds import Threshold, thresholds
from mea_ray.config import ExperimentConfig, digest, identity
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.experiment.artifacts import Store
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.model_sources import StoredModels
from mea_ray.experiment.names import Names
from mea_ray.experiment.proof import marks_answers
from mea_ray.experiment.verifier import Verifier
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport, read_record
from mea_ray.storage.files import write_whole
from mea_ray.storage.remote import Storage
from mea_ray.sweep import cluster
from mea_ray.sweep.modules import modules_to_send
from mea_ray.sweep.tasks import Tasks
from mea_ray.sweep.trainable import use_resources

logger = logging.getLogger(__name__)

Role = Literal["null", "victim"]
ROLES: tuple[Role, ...] = ("null", "victim")
OnModel = Callable[["Calibrated", int, int], None]
"""Called with each verified model, how many are done, and how many there will be."""


class Calibrated(BaseModel):
    """One verified model.

    Attributes:
        role: Innocent (``null``) or watermarked (``victim``).
        index: Which one; the two of one index share their data's splits and the key.
        report: What verification says.
        forged: What a forger gets from each pair of classes, (classes, classes); None where there is nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Role
    index: int
    report: ModelReport
    forged: list[list[float | None]]

    @property
    def wsr(self) -> float:
        """Watermark success rate."""
        assert self.report.wsr is not None
        return self.report.wsr.rate

    @property
    def best_forgery(self) -> float:
        """The largest rate that a forger gets."""
        return max((value for row in self.forged for value in row if value is not None), default=0.0)


class Calibration(BaseModel):
    """What a calibration found, as it is written to ``calibration.json``.

    Attributes:
        config: The experiment, resolved.
        class_names: Names of the classes.
        models: All verified models.
        thresholds: On the WSR of a given key.
        statistics: How well each statistic separates watermarked models from innocent ones, the best first.
        forging: On what a forger gets who may choose classes and geometry: the threshold that he does not reach.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    config: dict[str, Any]
    class_names: list[str]
    models: list[Calibrated]
    thresholds: list[Threshold]
    statistics: list[Separation]
    forging: list[Threshold]

    def rates(self, role: Role) -> list[float]:
        """WSR of all models of a role."""
        return [model.wsr for model in self.models if model.role == role]


def calibrate(
    config: ExperimentConfig,
    models: int,
    *,
    address: str | None = None,
    significance: float = 0.05,
    on_model: OnModel | None = None,
) -> tuple[Calibration, Path]:
    """Train and verify ``models`` innocent and as many watermarked models, and set thresholds.

    Each pair has a victim's seed of its own: key, splits, weights and batches. A model that was trained or verified
    before, by an interrupted start or by a sweep with the same settings, is not trained again.

    Args:
        config: The experiment; its thief does nothing.
        models: Models of each kind, at least 2.
        address: Ray cluster, ``host:port`` or ``auto``; None starts one on this machine.
        significance: Part of innocent models that the fitted threshold may accuse.
        on_model: Told each verified model.

    Returns:
        The calibration and the folder it was written to.

    Raises:
        ConfigError: There are too few models, or victims carry no watermark, or are encoders.
    """
    if models < 2:
        raise ConfigError(f"models={models} must be at least 2 of each kind: a spread needs two")
    if config.victim.watermark.name == "none":
        raise ConfigError("victim.watermark=none has nothing to calibrate; choose a watermark")
    if marks_answers(config):
        raise ConfigError(
            f"victim.watermark={config.victim.watermark.name} is in the answers of a service, and calibrate asks none; "
            "choose a watermark that is in the model"
        )
    if config.encodes:
        raise ConfigError("calibrate works on classifiers; set victim.pretext=none")
    address = cluster.check_address(address)
    storage = Storage(config.storage)
    storage.check_writable()
    data = load_splits(config)
    check(config, data)
    names = Names.of(config, Fingerprints.of(data))
    made_by = {"victim": names.victim, "splits": names.data, "verification": identity(config.verification)}
    folder = storage.root / "calibration" / digest(made_by)
    done: dict[tuple[Role, int], Calibrated] = {}

    def report(found: Calibrated) -> None:
        done[found.role, found.index] = found
        if on_model is not None:
            on_model(found, len(done), 2 * models)

    for role, index in product(ROLES, range(models)):
        before = read_record(Calibrated, _file(folder, role, index))
        if before is not None:
            report(before)
    left = [index for index in range(models) if any((role, index) not in done for role in ROLES)]
    if left:
        py_modules = modules_to_send(config.resolved(), config.resources.py_modules, address)
        with cluster.quiet(), cluster.ray_cluster(address, py_modules) as ray:
            for pair in _run(ray, config, left):
                for found in pair:
                    write_whole(_file(folder, found.role, found.index), found.model_dump_json(indent=1))
                    report(found)
    found_models = [done[role, index] for index in range(models) for role in ROLES]
    innocent, marked = ([m for m in found_models if m.role == role] for role in ("null", "victim"))
    paper = config.verification.threshold
    calibration = Calibration(
        config=config.resolved(),
        class_names=list(data.test.class_names),
        models=found_models,
        thresholds=thresholds(
            [m.wsr for m in innocent], [m.wsr for m in marked], paper=paper, significance=significance
        ),
        statistics=separations([m.report.statistics for m in innocent], [m.report.statistics for m in marked]),
        forging=thresholds(
            [m.best_forgery for m in innocent], [m.wsr for m in marked], paper=paper, significance=significance
        ),
    )
    write_whole(folder / "calibration.json", calibration.model_dump_json(indent=1))
    return calibration, folder


def seeded(config: ExperimentConfig, index: int) -> ExperimentConfig:
    """Return the experiment with the ``index``-th victim's seed."""
    victim = config.victim.model_copy(update={"seed": config.victim.seed + index})
    return config.model_copy(update={"victim": victim})


def verified(config: ExperimentConfig, index: int) -> tuple[Calibrated, Calibrated]:
    """Get or train an innocent and a watermarked model, and verify both; this is what runs in a worker.

    The innocent model is asked with the very key of its pair, on images that neither of the two was trained on.

    Args:
        config: The experiment, with the victim's seed of the first pair.
        index: Which pair.
    """
    use_resources(config.resources.victim.cpus, config.resources.victim.gpus)
    own = seeded(config, index)
    data = load_splits(own)
    models = StoredModels(Store(own.storage), own, data, Names.of(own, Fingerprints.of(data)))
    victim, key = models.victim()
    verifier = Verifier(own, data, key)

    def judged(role: Role, model: ImageModel) -> Calibrated:
        rates = forging.forge(model, data.verification, seed=derive(own.seed, "forger"))
        best = forging.best_of_pairs(rates)
        forged = [[None if np.isnan(value) else float(value) for value in row] for row in best]
        return Calibrated(role=role, index=index, report=verifier.report(model), forged=forged)

    return judged("null", models.null(0)), judged("victim", victim)


def _run(ray: Any, config: ExperimentConfig, left: list[int]) -> Iterator[tuple[Calibrated, Calibrated]]:
    reserved = config.resources.victim
    remote = ray.remote(verified).options(num_cpus=reserved.cpus, num_gpus=reserved.gpus, max_retries=2)
    tasks = Tasks(logger.warning)
    for index in left:
        tasks.add(str(index), f"training and verifying pair {index}", partial(remote.remote, config, index))
    try:
        for _, reference, error in tasks.results():
            if error is not None:
                raise error
            yield ray.get(reference)
    except BaseException:
        tasks.cancel()
        raise


def _file(folder: Path, role: Role, index: int) -> Path:
    return folder / "models" / f"{role}-{index:03d}.json"
