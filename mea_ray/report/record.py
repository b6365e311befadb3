"""A recorded sweep: its config, command, commit and results, small enough for git.

``sweeps/results/<name>/`` holds ``record.json``, ``sweep.yaml`` (resolved) and ``results/<trial>.json`` in the usual
result schema. Tables and curves of the documentation are rendered from these folders (``mea_ray.report.pages``).
"""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mea_ray.config import load_tree, yaml_text
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.report.tables import listed
from mea_ray.results.portable import anonymous, cleaned, portable
from mea_ray.results.records import RESULTS, SCHEMA_VERSION, TrialResult, read_results
from mea_ray.storage.files import write_whole
from mea_ray.sweep.event_log import EVENTS, read

RECORD = "record.json"
SWEEP = "sweep.yaml"
CURVE_POINTS = 50
"""Maximum number of points of each of an attack's own curves in a record."""


class SweepRecord(BaseModel):
    """How a recorded sweep was made.

    Attributes:
        command: The command line.
        commit: Commit of mea_ray, ``unknown`` if it ran from no git checkout.
        date: Day on which the sweep was started (UTC), ISO 8601.
        device: Device of the trials.
        versions: Versions of Python and of the packages that the results depend on.
        trials: Number of trials.
        seconds: Total wall time of all trials, which run in parallel.
        note: A note for readers, e.g. about the machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    command: str = Field(min_length=1)
    commit: str
    date: str
    device: str
    versions: dict[str, str]
    trials: int
    seconds: float
    note: str = ""

    @classmethod
    def load(cls, folder: Path) -> SweepRecord:
        """Read the record of a folder below ``sweeps/results``.

        Raises:
            ArtifactError: There is none, or it is damaged.
        """
        path = folder / RECORD
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be read ({error.strerror}); make a record with `mea-ray report SWEEP --record {folder}`"
            ) from error
        except ValidationError as error:
            raise ArtifactError(f"{path} is damaged: {error.errors()[0]['msg']}; restore it from git") from error


def make_record(folder: Path, target: Path, *, command: str | None = None, note: str = "") -> SweepRecord:
    """Turn the folder of a finished sweep into a record.

    Absolute paths, URIs, the storage, the W&B account, pictures, and all but ``CURVE_POINTS`` points of each curve are
    removed.

    Args:
        folder: The sweep's folder.
        target: Folder of the record, e.g. ``sweeps/results/budgets``. An existing record is replaced.
        command: The command line that started the sweep; None takes the one in the sweep's log.
        note: A note for readers, e.g. about the machine.

    Raises:
        ConfigError: No command is known, or ``target`` is a folder with other content than a record.
        ArtifactError: There are no usable results, or fewer than planned trials.
    """
    results = read_results(folder)
    started, logged, planned = _first_start(folder)
    command = command or logged
    if not command:
        raise ConfigError(f"{folder} does not contain the command that started the sweep; add it with --command '...'")
    if planned is not None and len(results) < planned:
        raise ArtifactError(
            f"{folder} holds {len(results)} results of {planned} trials; finish the sweep with --resume first"
        )
    check_target(target)
    record = SweepRecord(
        command=portable(command),
        commit=listed(result.versions.get("commit", "unknown") for result in results),
        date=(started or datetime.now(timezone.utc)).date().isoformat(),
        device=listed(result.device for result in results),
        versions={
            name: listed(result.versions[name] for result in results if name in result.versions)
            for name in results[0].versions
            if name != "commit"
        },
        trials=len(results),
        seconds=round(sum(result.seconds for result in results), 1),
        note=note,
    )
    shutil.rmtree(target / RESULTS, ignore_errors=True)
    for result in results:
        path = target / RESULTS / f"{result.trial}.json"
        # All defaults are omitted except the version, without which the others are unknown.
        tree = {"schema_version": SCHEMA_VERSION, **json.loads(slim(result).model_dump_json(exclude_defaults=True))}
        write_whole(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    if (folder / SWEEP).exists():
        tree = cleaned(load_tree(folder / SWEEP))
        tree["base"] = anonymous(tree.get("base") or {})
        write_whole(target / SWEEP, yaml_text.dump(tree, width=110))
    write_whole(target / RECORD, record.model_dump_json(indent=1) + "\n")
    return record


def check_target(target: Path) -> None:
    """Reject a folder with other content than a record.

    Raises:
        ConfigError: The folder has other content.
    """
    if target.exists() and not (target / RECORD).exists() and any(target.iterdir()):
        raise ConfigError(f"{target} exists and is not a record (it has no {RECORD}); choose another folder")


def slim(result: TrialResult) -> TrialResult:
    """Return a result without names of machines or accounts, and without large data."""
    tree = cleaned(result.model_dump(mode="json"))
    tree["config"] = anonymous(tree["config"])
    for rung in (*tree["rungs"], *tree["stolen_nulls"]):
        rung["curves"] = {name: _thinned(points) for name, points in rung["curves"].items()}
    for detection in tree["detections"]:
        for trigger in detection["triggers"]:
            trigger["picture"] = ""
    return TrialResult.model_validate(tree)


def _thinned(points: list[Any]) -> list[Any]:
    if len(points) <= CURVE_POINTS:
        return points
    step = (len(points) - 1) / (CURVE_POINTS - 1)
    return [points[round(place * step)] for place in range(CURVE_POINTS)]


def command_of(folder: Path) -> str:
    """Return the command that started a sweep, without machine-specific parts; empty if unknown."""
    try:
        return SweepRecord.load(folder).command
    except ArtifactError:
        return portable(_first_start(folder)[1])


def _first_start(folder: Path) -> tuple[datetime | None, str, int | None]:
    """Return when a sweep was first started, by which command, and how many trials it planned, from its event log."""
    try:
        first = next(((t, fields) for t, name, fields in read(folder / EVENTS) if name == "SweepStarted"), None)
        if first is not None:
            t, fields = first
            return datetime.fromtimestamp(t, timezone.utc), str(fields.get("command", "")), int(fields["trials"])
    except (OSError, ValueError, OverflowError, KeyError, TypeError):  # a log that was edited
        pass
    return None, "", None
