"""A sweep's folder: its stored files, from which ``--resume`` continues.

``sweep.yaml`` (resolved), ``plan.json``, ``results/<trial>.json`` (finished trials), ``trials/<trial>/`` (answers,
finished rungs, substitutes), ``ledgers/`` (what the services charged), ``assessments/`` (victims and null models).
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mea_ray.config import SweepConfig, write_yaml
from mea_ray.core.errors import ArtifactError, ConfigError, StorageUnavailable
from mea_ray.experiment.journal import FolderJournal, FolderSteps, Warn
from mea_ray.results.portable import portable_point
from mea_ray.results.records import TrialResult
from mea_ray.storage.files import PATIENCE, patiently, write_whole
from mea_ray.storage.remote import IDENTITY, Storage
from mea_ray.sweep.events import OnEvent, Warned
from mea_ray.sweep.plan import Plan, check_same

STOPPED = "stopped.json"
"""File of a trial that the scheduler stopped before its first rung."""
PARTS = ("results", "trials", "ledgers", "assessments")
STARTED = ("events.jsonl", "summary.csv", IDENTITY)
"""Other files that every start of a sweep writes."""
LAST_DRIVER = "driver.id"
"""File beside the ledgers that identifies the run with the last charges."""
ENTRIES = {*PARTS, *STARTED, "sweep.yaml", "plan.json", "wandb", "report.html"}
"""Everything that a sweep writes to its folder."""


class StoredResults:
    """The current results of a sweep, read one at a time: a thousand need no more memory than one.

    Args:
        folder: The folder ``results``.
        points: What the sweep set in each planned trial; None where nothing is planned, as in an adaptive search.

    Attributes:
        paths: All files, including damaged ones; the others are named after their trials.
    """

    def __init__(self, folder: Path, points: Mapping[str, Any] | None = None) -> None:
        self.paths = sorted(folder.glob("*.json"))
        self._points = points

    def __iter__(self) -> Iterator[TrialResult]:
        """Read them in the order of their names; damaged or misplaced ones are skipped."""
        for path in self.paths:
            if (result := read_result(path, self._points)) is not None:
                yield result

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_result(path: Path, points: Mapping[str, Any] | None = None) -> TrialResult | None:
    """Return a finished trial's result; None if it is missing, damaged, or not that of the planned trial."""
    try:
        result = TrialResult.load(path)
    except ArtifactError:
        return None
    if points is None:
        return result
    return result if _plain(points.get(result.trial, {})) == _plain(result.point) else None


def planned_points(plan: Path) -> dict[str, Any] | None:
    """Return the point of each trial of a plan; None if its trials are not known beforehand, or there is no plan."""
    try:
        trials = json.loads(patiently(plan.read_bytes, plan))["trials"]
        return {trial["name"]: trial["point"] for trial in trials} or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain(point: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(portable_point(point), default=str))


class TrialFolder(FolderJournal):
    """The folder of a trial: the journal from which another process resumes, its point, and why it failed.

    Args:
        storage: The storage of the sweep.
        sweep: Name of the sweep.
        name: Name of the trial.
        warn: Called with a message for each damaged file, whose step is repeated.
    """

    def __init__(self, storage: Storage, sweep: str, name: str, warn: Warn = lambda text: None) -> None:
        super().__init__(storage, f"{sweep}/trials/{name}", FolderSteps(storage, sweep), warn)
        self.error = self.folder / "error.json"

    def save_point(self, point: Mapping[str, Any]) -> None:
        """Save what the sweep set, for a search that has to suggest it again."""
        write_whole(self.folder / "point.json", json.dumps(dict(point), indent=1))
        self.storage.push(f"{self.relative}/point.json")

    def point(self) -> dict[str, Any] | None:
        """Return what the sweep set; None if the trial was never started."""
        try:
            return dict(json.loads((self.folder / "point.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def save_error(self, reason: str, trace: str) -> None:
        """Save why the trial failed."""
        write_whole(self.error, json.dumps({"reason": reason, "traceback": trace}, indent=1))
        self.storage.push(f"{self.relative}/{self.error.name}")

    def forget_error(self) -> None:
        """Reset a trial that failed in an earlier run."""
        if self.error.exists():
            self.storage.delete_file(f"{self.relative}/{self.error.name}")

    def save_stopped(self, epochs: int) -> None:
        """Note that the scheduler stopped the trial before its first rung: there is no result, and none will follow."""
        self.folder.mkdir(parents=True, exist_ok=True)  # it ran on another node
        write_whole(self.folder / STOPPED, json.dumps({"epochs": epochs}, indent=1))
        self.storage.push(f"{self.relative}/{STOPPED}")

    def failure(self) -> str | None:
        """Return why the trial failed in this run; None if it did not."""
        try:
            return str(json.loads(self.error.read_text(encoding="utf-8"))["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def pull(self) -> None:
        """Download the folder from remote storage, as another node left it."""
        self.storage.pull_folder(self.relative)

    def pull_one(self, name: str) -> bool:
        """Download one file of it from remote storage; returns whether it exists."""
        return self.storage.pull_file(f"{self.relative}/{name}")


class SweepFolder:
    """The folder ``<storage>/<sweep name>``. Picklable: every process opens the storage for itself.

    Args:
        storage: Location of the storage.
        name: The sweep's name.
        identity: Identifies one of several folders of that name in remote storage, see `Storage.claim_cache`.
    """

    def __init__(self, storage: str, name: str, identity: str = "") -> None:
        self.storage = Storage(storage)
        self.location, self.name, self.identity = self.storage.location, name, identity
        self.path = self.storage.root / name
        self.storage.adopt_cache(name, identity)
        self._made: list[Path] = []  # folders and files that this process created in `open`, outermost first

    def __reduce__(self) -> tuple[Any, ...]:
        return SweepFolder, (self.location, self.name, self.identity)

    def open(self, sweep: SweepConfig, plan: Plan, *, resume: bool) -> None:
        """Make the folder, or open the existing one.

        Raises:
            ConfigError: It exists and ``resume`` is not set, it belongs to another sweep, or the storage cannot be
                written. A partly made folder is removed.
        """
        self._made.clear()
        try:
            with self.storage.writing():
                self._open(sweep, plan, resume=resume)
        except BaseException:
            self.discard_if_unused()
            raise

    def _open(self, sweep: SweepConfig, plan: Plan, *, resume: bool) -> None:
        if self.begun(resume=resume):
            check_same(self.path / "plan.json", plan)
        self.identity = self.storage.claim_cache(self.name, make=True)
        for folder in (*reversed(self.path.parents), self.path, *(self.path / part for part in PARTS)):
            if not folder.exists():
                folder.mkdir()
                self._made.append(folder)
        for file in (self.path / "sweep.yaml", self.path / "plan.json"):
            if not file.exists():
                self._made.append(file)
        write_yaml(sweep, self.path / "sweep.yaml")
        plan.save(self.path / "plan.json")
        self.push("sweep.yaml")
        self.push("plan.json")

    def begun(self, *, resume: bool) -> bool:
        """Return whether the sweep was started before; its plan and results are then at hand.

        Raises:
            ConfigError: It was and ``resume`` is not set, or the folder is not a sweep's.
        """
        there = self.storage.holds(f"{self.name}/plan.json")
        if not there:
            self.storage.discard_cache(self.name)
        if there and not resume:
            raise ConfigError(
                f"the sweep {self.name!r} has been started in {self.path} before; continue with --resume, or choose "
                "another name (name=...)"
            )
        if there:
            self.identity = self.storage.claim_cache(self.name, make=True)
            self.storage.pull_file(f"{self.name}/plan.json")
            self.storage.pull_folder(f"{self.name}/results")
        else:
            self._refuse_what_is_not_a_sweep()
        return there

    def _refuse_what_is_not_a_sweep(self) -> None:
        """Reject a folder with anything that a sweep does not write."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; choose another name for the sweep (name=..., or run --name)")
        foreign = sorted(path.name for path in self.path.iterdir() if path.name not in ENTRIES)
        if foreign:
            examples = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise ConfigError(
                f"{self.path} exists and is not the folder of a sweep (it holds {examples}); choose another name for "
                "the sweep (name=..., or run --name) or another storage (storage=...)"
            )

    @property
    def marker(self) -> Path | None:
        """A file that exists as long as the storage is available; None for remote storage, which is queried itself."""
        return self.path / "plan.json" if self.storage.remote is None else None

    def patience(self) -> dict[str, Any]:
        """Return what `PATIENCE` needs to know about remote storage."""
        if self.storage.remote is None:
            return {}
        return {"there": partial(self.storage.holds, f"{self.name}/plan.json"), "name": self.location}

    def be_patient(self, seconds: float, on_event: OnEvent) -> None:
        """Make this process wait, with a warning, while the storage is full or unavailable."""
        PATIENCE.begin(seconds, self.marker, lambda text: on_event(Warned(text)), **self.patience())

    def wait(self) -> None:
        """Wait until the storage is available.

        Raises:
            StorageUnavailable: It was not available in time.
        """

        def look() -> None:
            if self.storage.remote is not None and not self.storage.holds(f"{self.name}/plan.json"):
                raise StorageUnavailable(self.location, "away", 0.0, f"it has no {self.name}/plan.json")

        patiently(look, self.path)

    def discard_if_unused(self) -> None:
        """Free the name of a sweep that was rejected before its first trial.

        Only what the last ``open`` of this object created is removed: its two files, its event log, and its empty
        folders. All other files, above all the user's, remain.
        """
        if not self._made:
            return
        if any((self.path / part).is_dir() and any((self.path / part).iterdir()) for part in ("trials", "results")):
            return
        if self.path in self._made:  # the log of a start that made the folder is of this start, too
            self._made += [self.path / name for name in STARTED]
        for path in sorted(self._made, reverse=True):  # contents before their folder
            if path.is_dir():
                with contextlib.suppress(OSError):  # not empty: it holds files of other origin
                    path.rmdir()
            else:
                with contextlib.suppress(OSError):  # a storage that cannot be written is why it was rejected
                    self.storage.delete_file(path.relative_to(self.storage.root).as_posix())
        self._made.clear()

    def trial(self, name: str, warn: Warn = lambda text: None) -> TrialFolder:
        """Folder of a trial's work."""
        return TrialFolder(self.storage, self.name, name, warn)

    def trials(self) -> list[TrialFolder]:
        """Folders of all trials that were ever started, in the order of their names, with their points downloaded."""
        if self.storage.remote is not None:
            self.storage.pull_folder(f"{self.name}/trials", only="point.json")
        return [self.trial(path.name) for path in sorted((self.path / "trials").iterdir()) if path.is_dir()]

    def stopped(self) -> set[str]:
        """Return the names of the trials that the scheduler stopped before their first rung."""
        if self.storage.remote is not None:
            self.storage.pull_folder(f"{self.name}/trials", only=STOPPED)
        return {path.parent.name for path in (self.path / "trials").glob(f"*/{STOPPED}")}

    def result_path(self, trial: str) -> Path:
        """Where a finished trial's result is."""
        return self.path / "results" / f"{trial}.json"

    def result(self, trial: str) -> TrialResult | None:
        """Return a finished trial's result; None if it is missing or damaged."""
        return read_result(self.result_path(trial), planned_points(self.path / "plan.json"))

    def fetch_result(self, trial: str) -> Path | None:
        """Return the path of a trial's result on this node, downloaded if needed; None if there is none."""
        path = self.result_path(trial)
        if not path.exists():
            self.storage.pull_file(f"{self.name}/results/{path.name}")
        return path if path.exists() else None

    def fetch_ledgers(self) -> None:
        """Replace the ledgers on this node by those in remote storage if another machine has driven the sweep since.

        The other machine's ledgers contain charges that the local ones lack. If both were continued, neither would be
        complete. Query logs are not in remote storage: those of this node are removed with its ledgers.
        """
        if self.storage.remote is None:
            return
        ledgers = self.path / "ledgers"
        ledgers.mkdir(parents=True, exist_ok=True)
        here = ledgers / LAST_DRIVER
        before = here.read_text(encoding="utf-8") if here.exists() else ""
        here.unlink(missing_ok=True)
        names = self.storage.names(f"{self.name}/ledgers")
        self.storage.pull_file(f"{self.name}/ledgers/{LAST_DRIVER}")
        ours = before == (here.read_text(encoding="utf-8") if here.exists() else "")
        for path in [] if ours else ledgers.glob("*.sqlite*"):
            path.unlink()
        for name in names:
            if name.endswith(".sqlite") and not (ledgers / name).exists():
                self.storage.pull_file(f"{self.name}/ledgers/{name}")
        write_whole(here, uuid.uuid4().hex)
        self.push(f"ledgers/{LAST_DRIVER}")

    def keep_ledger(self, copy: str, name: str) -> None:
        """Copy a ledger to remote storage under its name."""
        self.storage.push_as(Path(copy), f"{self.name}/ledgers/{name}")

    def save_result(self, result: TrialResult) -> None:
        """Write a finished trial's result."""
        path = self.result_path(result.trial)
        result.save(path)
        self.push(f"results/{path.name}")

    def results(self) -> StoredResults:
        """Return all readable results, in the order of their names."""
        return StoredResults(self.path / "results", planned_points(self.path / "plan.json"))

    def models(self, result: TrialResult) -> dict[str, Path]:
        """Return the folders of a trial's models that are on this node: ``victim``, ``substitute-<budget>``."""
        work = self.trial(result.trial)
        folders = {f"substitute-{rung.budget}": work.substitute_folder(rung.budget) for rung in result.rungs}
        folders["victim"] = self.storage.root / "artifacts" / "victims" / result.victim
        return {name: path for name, path in folders.items() if path.is_dir()}

    def push(self, relative: str) -> None:
        """Copy one file or folder of the sweep to remote storage."""
        self.storage.push(f"{self.name}/{relative}")
