"""Journals of an experiment: a trial's folder, from which another process can resume, and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from mea_ray.attacks.transfer import TransferSet
from mea_ray.core.errors import ArtifactError
from mea_ray.results.records import RecordT, RungResult, TrialResult, read_record
from mea_ray.storage.files import write_whole
from mea_ray.storage.remote import Storage

if TYPE_CHECKING:
    from mea_ray.models.base import ImageModel

Warn = Callable[[str], None]
BEGUN = "begun"
"""Step that every trial takes before its first query."""


class FolderSteps:
    """Records of finished steps as JSON files.

    Args:
        storage: The storage; every record is pushed to it.
        relative: Their folder in the storage; a step named ``rungs/200`` is in ``rungs/200.json``.
    """

    def __init__(self, storage: Storage, relative: str) -> None:
        self.storage, self.relative, self.folder = storage, relative, storage.root / relative

    def find(self, name: str, kind: type[RecordT]) -> RecordT | None:
        """Return a record; None if it is missing or damaged."""
        return read_record(kind, self.path(name))

    def keep(self, name: str, record: BaseModel) -> None:
        """Write a record atomically."""
        write_whole(self.path(name), record.model_dump_json(indent=1))
        self.storage.push(f"{self.relative}/{name}.json")

    def unfinished(self, name: str) -> tuple[Storage, str] | None:
        """Return the storage, and its folder for the snapshots of an unfinished step."""
        return self.storage, f"{self.relative}/unfinished/{name}"

    def discard(self, name: str) -> None:
        """Remove the folder of ``unfinished``."""
        relative = f"{self.relative}/unfinished/{name}"
        if (self.storage.root / relative).exists():
            self.storage.delete(relative)

    def path(self, name: str) -> Path:
        """File of a step."""
        return self.folder / f"{name}.json"


class FolderJournal(FolderSteps):
    """The journal of a trial in its folder.

    ``transfer/`` holds the answers, ``substitutes/<budget>/`` the stolen models, ``rungs/``, ``controls/``,
    ``removals/`` and ``detections/`` one JSON a step, and ``partial.json`` the result so far.

    Args:
        storage: The storage that the folder is in; every finished step is pushed to it.
        relative: The folder in the storage.
        shared: Steps shared with other trials.
        warn: Called with a message for each damaged file, whose step is repeated.
    """

    def __init__(self, storage: Storage, relative: str, shared: FolderSteps, warn: Warn = lambda text: None) -> None:
        super().__init__(storage, relative)
        self.shared, self._warn = shared, warn

    @cached_property
    def transfer(self) -> TransferSet:
        """The answers that the thief received; a damaged part is set aside and queried again."""
        return TransferSet(self.folder / "transfer", on_damage=self._warn)

    def rung(self, budget: int) -> RungResult | None:
        """Return a finished rung whose record and substitute are intact; None without one."""
        from mea_ray.training.checkpoint import check_model

        path = self.path(f"rungs/{budget}")
        if not path.exists():
            return None
        rung = self.find(f"rungs/{budget}", RungResult)
        try:
            if rung is None:
                raise ArtifactError(f"{path} is damaged")
            if rung.budget != budget:
                raise ArtifactError(f"{path} is that of {rung.budget} queries")
            weights = check_model(self.substitute_folder(budget))
            if rung.weights_sha256 not in {None, weights}:
                raise ArtifactError(f"{path} describes another substitute")
        except ArtifactError as error:
            self._warn(f"{error}; the rung of {budget} queries is repeated from the saved answers")
            return None
        return rung

    def keep_rung(self, rung: RungResult, substitute: ImageModel) -> None:
        """Save a finished rung with its answers; its record is written last."""
        from mea_ray.training.checkpoint import save_model

        save_model(self.substitute_folder(rung.budget), substitute, {"role": "substitute", "trial": self.folder.name})
        for part in ("config.yaml", "transfer", f"substitutes/{rung.budget}"):
            self.storage.push(f"{self.relative}/{part}")
        self.keep(f"rungs/{rung.budget}", rung)

    @property
    def has_begun(self) -> bool:
        """Whether this trial has queried before; if not, answers in its folder are another trial's."""
        return self.path(BEGUN).exists()

    def begin_anew(self) -> None:
        """Delete the answers and the rungs based on them, here and in remote storage."""
        for part in ("rungs", "transfer"):
            self.storage.delete(f"{self.relative}/{part}")
        self.__dict__.pop("transfer", None)

    def drop(self, *parts: str) -> None:
        """Remove parts of a finished trial, here and in remote storage: ``substitutes``, ``transfer``."""
        for part in parts:
            self.storage.delete(f"{self.relative}/{part}")

    def substitute(self, budget: int) -> ImageModel:
        """Load the substitute of a finished rung.

        Raises:
            ArtifactError: It is damaged.
        """
        from mea_ray.training.checkpoint import load_model

        return load_model(self.substitute_folder(budget))[0]

    def partial(self) -> TrialResult | None:
        """Return the result so far; None before the first rung, and if another trial's was copied here."""
        stored = self.find("partial", TrialResult)
        return stored if stored is None or stored.trial == self.folder.name else None

    def keep_partial(self, result: TrialResult) -> None:
        """Save the result so far."""
        self.keep("partial", result)

    def substitute_folder(self, budget: int) -> Path:
        """Folder of the substitute of a rung."""
        return self.folder / "substitutes" / str(budget)


class MemorySteps:
    """Records of finished steps in memory."""

    def __init__(self) -> None:
        self._records: dict[str, BaseModel] = {}

    def find(self, name: str, kind: type[RecordT]) -> RecordT | None:
        """Return a record; None if the step is not done."""
        stored = self._records.get(name)
        return stored if isinstance(stored, kind) else None

    def keep(self, name: str, record: BaseModel) -> None:
        """Keep a record."""
        self._records[name] = record

    def unfinished(self, name: str) -> None:
        """Return None: memory does not outlive the process."""

    def discard(self, name: str) -> None:
        """Nothing is there to be removed."""


class MemoryJournal(MemorySteps):
    """A journal in memory, lost with its process."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = MemorySteps()
        self.transfer = TransferSet()
        self._substitutes: dict[int, ImageModel] = {}

    def rung(self, budget: int) -> RungResult | None:
        """Return a finished rung; None if it is not done."""
        return self.find(f"rungs/{budget}", RungResult)

    def keep_rung(self, rung: RungResult, substitute: ImageModel) -> None:
        """Keep a finished rung and its substitute."""
        self._substitutes[rung.budget] = substitute
        self.keep(f"rungs/{rung.budget}", rung)

    def substitute(self, budget: int) -> ImageModel:
        """Return the substitute of a finished rung."""
        return self._substitutes[budget]

    def partial(self) -> TrialResult | None:
        """Return the result so far; None before the first rung."""
        return self.find("partial", TrialResult)

    def keep_partial(self, result: TrialResult) -> None:
        """Save the result so far."""
        self.keep("partial", result)
