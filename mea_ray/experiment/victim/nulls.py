"""Verification of a victim's null models: one file per model in the owner's part of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mea_ray.config import ExperimentConfig, digest, identity
from mea_ray.experiment.victim.card import cost_of_mark
from mea_ray.experiment.victim.folder import NULLS, OWNER, Victim
from mea_ray.results.records import ModelReport, read_record
from mea_ray.storage.files import write_whole


class NullRecord(BaseModel):
    """One measured null model.

    Attributes:
        made_by: Hash of everything that determines the measurement, see ``measured_by``.
        index: Index of the null model.
        report: Verification of it, or of its substitute.
        budget: Query budget of its thief, in images; None for the null model itself.
        thief: Hash of the thief's settings; empty for the null model itself.
        attack: Name of the thief's attack.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    made_by: str
    index: int
    report: ModelReport
    budget: int | None = None
    thief: str = ""
    attack: str = ""


def measured_by(victim: Victim) -> str:
    """Return a hash of what measurements with a victim's key depend on: weights, data, and settings of verification.

    Measurements with other settings cannot be ranked together with these.
    """
    verification = {
        name: value
        for name, value in identity(victim.config.verification).items()
        if name in {"samples", "reading", "probe_images"}
    }
    made = [victim.about.weights_sha256, victim.about.card.data_fingerprint, victim.config.seed, verification]
    return digest(made)


def thief_digest(config: ExperimentConfig) -> str:
    """Return a hash of the thief's settings without its budgets: each budget has controls of its own."""
    thief: dict[str, Any] = identity(config.thief)
    return digest([{name: value for name, value in thief.items() if name != "budgets"}, config.seed])


def folder_of(victim: Victim) -> Path:
    """Return the folder of the measurements."""
    return victim.require_folder() / OWNER / NULLS


def file_of(victim: Victim, index: int, budget: int | None = None, thief: str = "") -> Path:
    """Return the file of one measurement."""
    name = f"null-{index:04d}" if budget is None else f"stolen-{thief}-{budget}-{index:04d}"
    return folder_of(victim) / f"{name}.json"


def keep(victim: Victim, record: NullRecord) -> None:
    """Write a measurement, readable only by the owner."""
    folder_of(victim).mkdir(mode=0o700, exist_ok=True)
    path = file_of(victim, record.index, record.budget, record.thief)
    write_whole(path, record.model_dump_json(indent=1), mode=0o600)


def read_nulls(victim: Victim) -> list[NullRecord]:
    """Return all measurements that match the victim in its current state, by file name."""
    made_by = measured_by(victim)
    records = [read_record(NullRecord, path) for path in sorted(folder_of(victim).glob("*.json"))]
    return [record for record in records if record is not None and record.made_by == made_by]


def innocent(records: list[NullRecord]) -> list[ModelReport]:
    """Return the reports of the null models themselves."""
    return [record.report for record in records if record.budget is None]


def budgets(records: list[NullRecord]) -> list[int]:
    """Return the budgets of the stolen null models, in ascending order."""
    return sorted({record.budget for record in records if record.budget is not None})


def stolen(records: list[NullRecord], budget: int) -> list[NullRecord]:
    """Return the null models that were stolen with a budget."""
    return [record for record in records if record.budget == budget]


def with_cost(victim: Victim) -> Victim:
    """Return the victim with the cost of its mark, relative to its null models, on its card."""
    nulls = innocent(read_nulls(victim))
    if not nulls:
        return victim
    source_cost, calibration_cost = cost_of_mark(victim.report, nulls)
    changes = {
        "accuracy_null": sum(null.accuracy for null in nulls) / len(nulls),
        "source_cost": source_cost,
        "calibration_cost": calibration_cost,
        "null_models": len(nulls),
    }
    return victim.with_card(victim.about.card.model_copy(update=changes))
