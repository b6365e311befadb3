"""Train, steal and judge many innocent and watermarked models in parallel on Ray; finished steps are on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mea_ray.calibration.measured import KeyMeasurements, find_measurements, measure_key
from mea_ray.calibration.models import (
    Folder,
    Forged,
    forged_file,
    make_innocent,
    make_marked,
    with_innocents,
)
from mea_ray.calibration.thresholds import Threshold, thresholds
from mea_ray.calibration.verdicts import BudgetTable, VerdictCounts, all_verdicts, statistics_at
from mea_ray.config import ExperimentConfig, digest, identity
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Settings
from mea_ray.core.versions import versions
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.names import Names
from mea_ray.experiment.proof import marks_answers
from mea_ray.results.portable import anonymous
from mea_ray.results.records import read_record
from mea_ray.storage.files import write_whole
from mea_ray.storage.remote import Storage
from mea_ray.sweep import cluster
from mea_ray.sweep.modules import modules_to_send
from mea_ray.sweep.tasks import Tasks

logger = logging.getLogger(__name__)

OnStep = Callable[[str, int, int], None]
"""Called with each step that is done, how many are done, and how many there will be."""
FILE = "calibration.json"


class Numbers(Settings):
    """How many models a calibration has.

    Raises:
        ConfigError: (``build``) There are too few, or more are stolen than there are.
    """

    innocents: int = Field(20, ge=2, description="Innocent models; a spread needs two.")
    stolen_innocents: int = Field(8, ge=0, description="How many of them are stolen with each budget.")
    marked: int = Field(8, ge=1, description="Watermarked models, each with its own key, each stolen with each budget.")

    @model_validator(mode="after")
    def _no_more_stolen_than_trained(self) -> Numbers:
        if self.stolen_innocents > self.innocents:
            raise ValueError(
                f"stolen_innocents={self.stolen_innocents} must be at most innocents={self.innocents}; steal fewer"
            )
        return self


class Calibration(BaseModel):
    """The results of a calibration, as they are written to ``calibration.json``.

    Attributes:
        config: The experiment, resolved.
        class_names: Names of the classes.
        innocents: Innocent models.
        stolen_innocents: How many of them were stolen with each budget.
        marked: Watermarked models, and as many keys.
        keys: What was measured with each key.
        forged: The success rates of a forger on each innocent model.
        thresholds: On the WSR of a given key.
        forging: On the success rate of a forger who may choose classes and geometry: the threshold that no forger
            reaches.
        statistics: For each budget, how well each statistic tells stolen models from innocent ones.
        verdicts: For each budget and statistic, what the verdict says of innocent and of stolen models.
        versions: Versions of Python and of the packages, and the commit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    config: dict[str, Any]
    class_names: list[str]
    innocents: int
    stolen_innocents: int
    marked: int
    keys: list[KeyMeasurements]
    forged: list[Forged]
    thresholds: list[Threshold]
    forging: list[Threshold]
    statistics: list[BudgetTable]
    verdicts: list[VerdictCounts]
    versions: dict[str, str]

    @property
    def innocent_rates(self) -> list[float]:
        """WSR of every innocent model with every key."""
        return [each.wsr for key in self.keys for each in key.models if each.role == "innocent"]

    @property
    def marked_rates(self) -> list[float]:
        """WSR of every watermarked model with its own key."""
        return [each.wsr for key in self.keys for each in key.models if each.role == "marked"]


def calibrate(
    config: ExperimentConfig,
    numbers: Numbers = Numbers(),
    *,
    address: str | None = None,
    significance: float = 0.05,
    on_step: OnStep | None = None,
) -> tuple[Calibration, Path]:
    """Train and steal innocent and watermarked models, and measure all of them with every key.

    Each watermarked model has a victim's seed of its own: key, splits, weights and batches. Each thief has a seed of
    its own. What was made before, by an interrupted start or by a sweep with the same settings, is not made again.

    Args:
        config: The experiment.
        numbers: How many models.
        address: Ray cluster, ``host:port`` or ``auto``; None starts one on this machine.
        significance: Part of innocent models that the fitted threshold may accuse.
        on_step: Called with each step.

    Returns:
        The calibration and the folder it was written to.

    Raises:
        ConfigError: Victims carry no watermark, or one in their answers, or are encoders.
    """
    _check_kind(config)
    address = cluster.check_address(address)
    storage = Storage(config.storage)
    storage.check_writable()
    data = load_splits(config)
    check(config, data)
    config = with_innocents(config, numbers.innocents)
    folder = Folder(storage, f"calibration/{_name(config)}")
    budgets = config.thief.budgets
    left = [index for index in range(numbers.marked) if _stored_key(folder, index, budgets, numbers) is None]
    if left or not all(read_record(Forged, forged_file(folder, each)) for each in range(numbers.innocents)):
        py_modules = modules_to_send(config.resolved(), config.resources.py_modules, address)
        with cluster.quiet(), cluster.ray_cluster(address, py_modules) as ray:
            for text, done, of in _run(ray, config, folder.relative, numbers, left):
                if on_step is not None:
                    on_step(text, done, of)
    keys = [
        record
        for index in range(numbers.marked)
        if (record := _stored_key(folder, index, budgets, numbers)) is not None
    ]
    calibration = _summary(config, data.test.class_names, numbers, keys, folder, significance)
    write_whole(folder.path / FILE, calibration.model_dump_json(indent=1))
    storage.push(f"{folder.relative}/{FILE}")
    return calibration, folder.path


def _check_kind(config: ExperimentConfig) -> None:
    if config.victim.watermark.name == "none":
        raise ConfigError("victim.watermark=none has nothing to calibrate; choose a watermark")
    if marks_answers(config):
        raise ConfigError(
            f"victim.watermark={config.victim.watermark.name} is in the answers of a service, and calibrate asks none; "
            "choose a watermark that is in the model"
        )
    if config.encodes:
        raise ConfigError("calibrate works on classifiers; set victim.pretext=none")


def _name(config: ExperimentConfig) -> str:
    """Name a calibration by everything that its models and measurements depend on, except their number."""
    names = Names.of(with_innocents(config, 1), Fingerprints.of(load_splits(config), config))
    tree = identity(config)
    made_by = {part: tree.get(part) for part in ("seed", "service", "thief")}
    samples = {"samples": config.verification.samples}
    return digest({"victim": names.victim, "splits": names.data, "verification": samples, **made_by})


def _stored_key(folder: Folder, index: int, budgets: tuple[int, ...], numbers: Numbers) -> KeyMeasurements | None:
    return find_measurements(folder, index, budgets, numbers.innocents, numbers.stolen_innocents)


def _run(
    ray: Any, config: ExperimentConfig, relative: str, numbers: Numbers, left: list[int]
) -> Iterator[tuple[str, int, int]]:
    """Make all models, then measure them with each key that is not done yet; yield the finished steps."""
    reserved = config.resources.victim
    options = {"num_cpus": reserved.cpus, "num_gpus": reserved.gpus, "max_retries": 2}
    innocent, marked, measure = (
        ray.remote(each).options(**options) for each in (make_innocent, make_marked, measure_key)
    )
    first: dict[str, Callable[[], Any]] = {
        f"innocent model {index}": partial(innocent.remote, config, relative, index, index < numbers.stolen_innocents)
        for index in range(numbers.innocents)
    }
    first |= {f"watermarked model {index}": partial(marked.remote, config, relative, index) for index in left}
    second = {
        f"key {index}": partial(measure.remote, config, relative, index, numbers.innocents, numbers.stolen_innocents)
        for index in left
    }
    done, of = 0, len(first) + len(second)
    for steps in (first, second):
        tasks = Tasks(logger.warning)
        for name, submit in steps.items():
            tasks.add(name, f"making or measuring {name}", submit)
        try:
            for name, _, error in tasks.results():
                if error is not None:
                    raise error
                done += 1
                yield name, done, of
        except BaseException:
            tasks.cancel()
            raise


def _summary(
    config: ExperimentConfig,
    class_names: tuple[str, ...],
    numbers: Numbers,
    keys: list[KeyMeasurements],
    folder: Folder,
    significance: float,
) -> Calibration:
    paths = [forged_file(folder, index) for index in range(numbers.innocents)]
    forged = [record for path in paths if (record := read_record(Forged, path)) is not None]
    innocent = [each.wsr for key in keys for each in key.models if each.role == "innocent"]
    marked = [each.wsr for key in keys for each in key.models if each.role == "marked"]
    limits = partial(thresholds, paper=config.verification.threshold, significance=significance)
    return Calibration(
        config=anonymous(config.resolved()),
        class_names=list(class_names),
        innocents=numbers.innocents,
        stolen_innocents=numbers.stolen_innocents,
        marked=numbers.marked,
        keys=keys,
        forged=forged,
        thresholds=limits(innocent, marked),
        forging=limits([each.best for each in forged], marked),
        statistics=[statistics_at(keys, budget) for budget in config.thief.budgets],
        verdicts=all_verdicts(keys, config.thief.budgets, config.verification),
        versions=versions(),
    )
