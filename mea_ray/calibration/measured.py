"""Every model of a calibration, measured with the key of every watermarked one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mea_ray.calibration.models import Folder, owners_models, seeded, substitutes
from mea_ray.config import ExperimentConfig
from mea_ray.core.types import Labels
from mea_ray.evaluation import metrics
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.verifier import Verifier
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport, read_record
from mea_ray.storage.files import write_whole
from mea_ray.storage.remote import Storage
from mea_ray.sweep.trainable import use_resources

Role = Literal["innocent", "stolen innocent", "marked", "stolen marked"]


class MeasuredModel(BaseModel):
    """One model, measured with one key.

    Attributes:
        role: What it is.
        index: Which one; a stolen model has the index of the model that it was stolen from.
        budget: Query budget of a stolen model; None for the others.
        report: What verification measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: Role
    index: int
    budget: int | None = None
    report: ModelReport

    @property
    def wsr(self) -> float:
        """Watermark success rate."""
        assert self.report.wsr is not None
        return self.report.wsr.rate


class KeyMeasurements(BaseModel):
    """All models, measured with the key of one watermarked model.

    Attributes:
        index: The watermarked model.
        key_drawn: Whether its key was drawn at random.
        chance: Accuracy of guessing.
        models: The innocent ones and what was stolen from them, the marked one and what was stolen from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    index: int
    key_drawn: bool
    chance: float
    models: list[MeasuredModel]

    def reports(self, role: Role, budget: int | None = None) -> list[ModelReport]:
        """Return the reports of all models of a role, of stolen ones those of a budget."""
        return [each.report for each in self.models if each.role == role and each.budget == budget]


def measure_key(config: ExperimentConfig, relative: str, index: int, innocents: int, stolen_innocents: int) -> None:
    """Measure all models with the key of the ``index``-th watermarked one; this runs in a worker.

    Args:
        config: The experiment, with as many null models as there are.
        relative: The calibration's folder in the storage.
        index: Which watermarked model.
        innocents: Number of innocent models.
        stolen_innocents: How many of them were stolen.
    """
    use_resources(config.resources.victim.cpus, config.resources.victim.gpus)
    folder, own = Folder(Storage(config.storage), relative), seeded(config, index)
    data = load_splits(own)
    victim, key = owners_models(own, data).victim()
    verifier = Verifier(own, data, key)
    labels = verifier.predictions(victim)
    before = read_record(KeyMeasurements, key_file(folder, index))
    known = {(each.role, each.index, each.budget): each for each in (before.models if before else [])}

    def measured(role: Role, place: int, budget: int | None, model: ImageModel, of: Labels | None) -> MeasuredModel:
        measured_before = known.get((role, place, budget))
        return measured_before or MeasuredModel(
            role=role, index=place, budget=budget, report=verifier.report(model, victim=of)
        )

    base_data = load_splits(config)
    base = owners_models(config, base_data)
    models = [measured("innocent", place, None, base.null(place), labels) for place in range(innocents)]
    for place, budget, model in substitutes(config, folder, "innocent", range(stolen_innocents)):
        models.append(measured("stolen innocent", place, budget, model, labels))
    models.append(measured("marked", index, None, victim, None))
    for place, budget, model in substitutes(config, folder, "marked", range(index, index + 1)):
        models.append(measured("stolen marked", place, budget, model, labels))
    measurements = KeyMeasurements(
        index=index, key_drawn=key is not None and key.drawn, chance=metrics.chance(data.test), models=models
    )
    write_whole(key_file(folder, index), measurements.model_dump_json(indent=1))
    folder.storage.push(f"{relative}/keys/{key_file(folder, index).name}")


def find_measurements(
    folder: Folder, index: int, budgets: tuple[int, ...], innocents: int, stolen_innocents: int
) -> KeyMeasurements | None:
    """Return the measurements with one key, of as many models as are wanted; None if any is missing."""
    path = key_file(folder, index)
    folder.storage.pull(path.relative_to(folder.storage.root).as_posix())
    stored = read_record(KeyMeasurements, path)
    if stored is None:
        return None
    known = {(each.role, each.index, each.budget): each for each in stored.models}
    wanted = list(_wanted(index, budgets, innocents, stolen_innocents))
    if any(place not in known for place in wanted):
        return None
    return stored.model_copy(update={"models": [known[place] for place in wanted]})


def _wanted(
    index: int, budgets: tuple[int, ...], innocents: int, stolen_innocents: int
) -> Iterator[tuple[Role, int, int | None]]:
    for place in range(innocents):
        yield "innocent", place, None
    for place in range(stolen_innocents):
        for budget in budgets:
            yield "stolen innocent", place, budget
    yield "marked", index, None
    for budget in budgets:
        yield "stolen marked", index, budget


def key_file(folder: Folder, index: int) -> Path:
    """Return the file of the measurements with the ``index``-th key."""
    return folder.path / "keys" / f"key-{index:03d}.json"
