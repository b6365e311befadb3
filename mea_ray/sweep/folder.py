"""A sweep's folder: what is kept of it, and what ``--resume`` finds again.

``sweep.yaml`` (resolved), ``plan.json``, ``results/<trial>.json`` (finished trials), ``trials/<trial>/`` (answers,
finished rungs, substitutes), ``ledgers/`` (what the services charged), ``assessments/`` (victims and null models).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mea_ray.config import SweepConfig, write_yaml
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.results.records import DetectionResult, RemovalResult, RungResult, TrialResult
from mea_ray.storage.files import PATIENCE, patiently, write_whole
from mea_ray.storage.remote import Storage
from mea_ray.sweep.events import OnEvent, Warned
from mea_ray.sweep.plan import Plan, check_same

ModelT = TypeVar("ModelT", bound=BaseModel)
PARTS = ("results", "trials", "ledgers", "assessments")
STARTED = ("events.jsonl", "summary.csv")
"""Files that every start of a sweep writes beside ``sweep.yaml`` and ``plan.json``."""
ENTRIES = {*PARTS, *STARTED, "sweep.yaml", "plan.json", "wandb", "report.html"}
"""All that a sweep writes into its folder."""


def read_model(model: type[ModelT], path: Path) -> ModelT | None:
    """Read a record; None if it is missing or damaged, so that it is made again."""
    try:
        return model.model_validate_json(patiently(path.read_bytes, path))
    except (OSError, ValidationError):
        return None


class Results:
    """The results that a sweep has now, read one at a time: a thousand need no more memory than one.

    Args:
        folder: The folder ``results``.

    Attributes:
        paths: All files, damaged ones too; a sound one is named after its trial.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.json"))

    def __iter__(self) -> Iterator[TrialResult]:
        """Read them in the order of their names; a damaged one is passed over, it must be made again."""
        for path in self.paths:
            with contextlib.suppress(ArtifactError):
                yield TrialResult.load(path)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class TrialFolder:
    """What a trial keeps while it runs, so that another process can go on with it.

    Args:
        storage: The storage of the sweep.
        relative: The folder in it.
    """

    def __init__(self, storage: Storage, relative: str) -> None:
        self.storage, self.relative = storage, relative
        self.path = storage.root / relative
        self.transfer = self.path / "transfer"
        self.partial = self.path / "partial.json"
        self.error = self.path / "error.json"

    def substitute(self, budget: int) -> Path:
        """Folder of the substitute of one rung."""
        return self.path / "substitutes" / str(budget)

    def rungs(self, budgets: Iterable[int], warn: Callable[[str], None]) -> dict[int, RungResult]:
        """Return the finished rungs whose record and substitute are as they were written.

        Args:
            budgets: Which rungs.
            warn: Told a sentence for each that was finished and has to be done again.
        """
        from mea_ray.training.checkpoint import check_model

        sound = {}
        for budget in budgets:
            path = self._rung(budget)
            if not path.exists():
                continue
            rung = read_model(RungResult, path)
            try:
                if rung is None:
                    raise ArtifactError(f"{path} is damaged")
                check_model(self.substitute(budget))
            except ArtifactError as error:
                warn(f"{error}; the rung of {budget} queries is done again from the answers that are kept")
            else:
                sound[budget] = rung
        return sound

    def save_rung(self, rung: RungResult) -> None:
        """Keep a finished rung."""
        write_whole(self._rung(rung.budget), rung.model_dump_json(indent=1))

    def control(self, index: int) -> RungResult | None:
        """Return the theft of the ``index``-th null model; None if it is not done."""
        return read_model(RungResult, self._control(index))

    def save_control(self, index: int, rung: RungResult) -> None:
        """Keep the theft of the ``index``-th null model."""
        write_whole(self._control(index), rung.model_dump_json(indent=1))

    def removal(self, name: str) -> RemovalResult | None:
        """Return a finished removal; None if it is not done."""
        return read_model(RemovalResult, self._removal(name))

    def save_removal(self, name: str, result: RemovalResult) -> None:
        """Keep a finished removal."""
        write_whole(self._removal(name), result.model_dump_json(indent=1))

    def detection(self, name: str) -> DetectionResult | None:
        """Return a finished detection; None if it is not done."""
        return read_model(DetectionResult, self._detection(name))

    def save_detection(self, name: str, result: DetectionResult) -> None:
        """Keep a finished detection."""
        write_whole(self._detection(name), result.model_dump_json(indent=1))

    def save_point(self, point: Mapping[str, Any]) -> None:
        """Keep what the sweep set, for a search that has to suggest it again."""
        write_whole(self.path / "point.json", json.dumps(dict(point), indent=1))

    def point(self) -> dict[str, Any] | None:
        """Return what the sweep set; None if the trial was never begun."""
        try:
            return dict(json.loads((self.path / "point.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def save_error(self, reason: str, trace: str) -> None:
        """Keep why the trial was given up."""
        write_whole(self.error, json.dumps({"reason": reason, "traceback": trace}, indent=1))

    def failure(self) -> str | None:
        """Return why the trial was given up in this run; None if it was not."""
        try:
            return str(json.loads(self.error.read_text(encoding="utf-8"))["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def push(self) -> None:
        """Copy the folder to a remote storage."""
        self.storage.push(self.relative)

    def pull(self) -> None:
        """Fetch what another node left in a remote storage."""
        self.storage.pull(self.relative)

    def _rung(self, budget: int) -> Path:
        return self.path / "rungs" / f"{budget}.json"

    def _removal(self, name: str) -> Path:
        return self.path / "removals" / f"{name}.json"

    def _detection(self, name: str) -> Path:
        return self.path / "detections" / f"{name}.json"

    def _control(self, index: int) -> Path:
        return self.path / "controls" / f"{index}.json"


class SweepFolder:
    """The folder ``<storage>/<sweep name>``. Picklable: every process opens the storage for itself.

    Args:
        storage: Location of the storage.
        name: The sweep's name.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.storage = Storage(storage)
        self.location, self.name = self.storage.location, name
        self.path = self.storage.root / name
        self._made: list[Path] = []  # what this process created in `open`, the outermost first

    def __reduce__(self) -> tuple[Any, ...]:
        return SweepFolder, (self.location, self.name)

    def open(self, sweep: SweepConfig, plan: Plan, *, resume: bool) -> None:
        """Make the folder, or take up the one that is there.

        Raises:
            ConfigError: There is one and ``resume`` is not set, it belongs to another sweep, or the storage cannot be
                written. Nothing is left of a folder that was being made.
        """
        self._made.clear()
        try:
            with self.storage.writing():
                self._open(sweep, plan, resume=resume)
        except BaseException:
            self.discard_if_unused()
            raise

    def _open(self, sweep: SweepConfig, plan: Plan, *, resume: bool) -> None:
        there = self.storage.pull(f"{self.name}/plan.json")
        if there and not resume:
            raise ConfigError(
                f"the sweep {self.name!r} has been started in {self.path} before; go on with --resume, or choose "
                "another name (name=...)"
            )
        if there:
            check_same(self.path / "plan.json", plan)
            self.storage.pull(f"{self.name}/results")
        else:
            self._refuse_what_is_not_a_sweep()
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

    def _refuse_what_is_not_a_sweep(self) -> None:
        """Refuse a folder that holds anything that a sweep does not write."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; choose another name for the sweep (name=..., or run --name)")
        foreign = sorted(path.name for path in self.path.iterdir() if path.name not in ENTRIES)
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise ConfigError(
                f"{self.path} exists and is not the folder of a sweep (it holds {shown}); choose another name for the "
                "sweep (name=..., or run --name) or another storage (storage=...)"
            )

    @property
    def marker(self) -> Path:
        """A file that is there as long as the storage is."""
        return self.path / "plan.json"

    def be_patient(self, seconds: float, on_event: OnEvent) -> None:
        """Have this process wait for the storage while it is full or away, and tell it."""
        PATIENCE.begin(seconds, self.marker, lambda text: on_event(Warned(text)))

    def wait(self) -> None:
        """Wait until the storage is there.

        Raises:
            StorageUnavailable: It did not come in time.
        """
        patiently(lambda: None, self.marker)

    def discard_if_unused(self) -> None:
        """Free the name of a sweep that was refused before its first trial.

        Only what the last ``open`` of this object created is removed: its two files and its event log, and of its
        folders those that are empty. Whatever lies beside them, files of the user's above all, stays.
        """
        if not self._made:
            return
        if any((self.path / part).is_dir() and any((self.path / part).iterdir()) for part in ("trials", "results")):
            return
        if self.path in self._made:  # the log of a start that made the folder is of this start, too
            self._made += [self.path / name for name in STARTED]
        for path in sorted(self._made, reverse=True):  # what lies in a folder before the folder
            if path.is_dir():
                with contextlib.suppress(OSError):  # not empty: somebody else's files are in it
                    path.rmdir()
            else:
                with contextlib.suppress(OSError):  # a storage that cannot be written is why it was refused
                    self.storage.delete_file(path.relative_to(self.storage.root).as_posix())
        self._made.clear()

    def trial(self, name: str) -> TrialFolder:
        """Folder of a trial's work."""
        return TrialFolder(self.storage, f"{self.name}/trials/{name}")

    def trials(self) -> list[TrialFolder]:
        """Folders of all trials that were ever begun, in the order of their names."""
        return [self.trial(path.name) for path in sorted((self.path / "trials").iterdir()) if path.is_dir()]

    def result_path(self, trial: str) -> Path:
        """Where a finished trial's result is."""
        return self.path / "results" / f"{trial}.json"

    def result(self, trial: str) -> TrialResult | None:
        """Return a finished trial's result; None if there is none, or it is damaged and must be made again."""
        try:
            return TrialResult.load(self.result_path(trial))
        except ArtifactError:
            return None

    def results(self) -> Results:
        """Return all readable results, in the order of their names."""
        return Results(self.path / "results")

    def models(self, result: TrialResult) -> dict[str, Path]:
        """Return the folders of a trial's models that are on this node: ``victim``, ``substitute-<budget>``."""
        work = self.trial(result.trial)
        folders = {f"substitute-{rung.budget}": work.substitute(rung.budget) for rung in result.rungs}
        folders["victim"] = self.storage.root / "artifacts" / "victims" / result.victim
        return {name: path for name, path in folders.items() if path.is_dir()}

    def push(self, relative: str) -> None:
        """Copy one file or folder of the sweep to a remote storage."""
        self.storage.push(f"{self.name}/{relative}")
