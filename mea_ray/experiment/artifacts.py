"""Victims, null models and stolen null models as artifacts: named by what determines them, written atomically.

An artifact is a folder ``artifacts/<kind>/<name>`` of the storage with ``model.safetensors``, ``model.json``, for
victims ``key.json`` (and ``key.safetensors``), ``config.yaml`` (the resolved config) and ``info.json`` (seed, package
versions, history, and every file with its size and checksum). ``info.json`` is written last.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_ray.config import ExperimentConfig, Tree, write_yaml
from mea_ray.core.errors import ArtifactError, LeaseLost
from mea_ray.storage.files import PATIENCE, patiently, sha256, write_whole
from mea_ray.storage.lease import Lease
from mea_ray.storage.remote import Storage
from mea_ray.training.checkpoint import DESCRIPTION

INFO = "info.json"
SCHEMA = 2
"""Of ``info.json``."""


@dataclass(frozen=True)
class Artifact:
    """An artifact by its storage and name; each process finds or downloads it by itself.

    Attributes:
        storage: Folder or URI.
        kind: ``victims``, ``nulls`` or ``stolen_nulls``.
        name: Its name.
    """

    storage: str
    kind: str
    name: str

    def folder(self) -> Path:
        """Return its folder on this node.

        Raises:
            ArtifactError: There is none, or it is damaged.
        """
        stored = Store(self.storage).find(self.kind, self.name)
        if stored is None:
            raise ArtifactError(f"{self.storage} has no artifact {self.kind}/{self.name}; resume the sweep to train it")
        return stored

    def description(self) -> Path:
        """Return a folder on this node with the model's description; the weights are not downloaded."""
        storage = Storage(self.storage)
        relative = f"artifacts/{self.kind}/{self.name}"
        if not storage.pull_file(f"{relative}/{DESCRIPTION}"):
            raise ArtifactError(f"{self.storage} has no artifact {self.kind}/{self.name}; resume the sweep to train it")
        return storage.root / relative


class Store:
    """The artifacts of a storage location.

    Args:
        storage: Folder or URI, or a ``Storage``.
        beat_s: Seconds between heartbeats of a process that trains.
        expiry_s: Seconds without a heartbeat after which a training process counts as dead and another one takes over.
        warn: Called with a message when a damaged artifact is made again.
    """

    def __init__(
        self,
        storage: str | Storage,
        *,
        beat_s: float = 3.0,
        expiry_s: float = 45.0,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.storage = storage if isinstance(storage, Storage) else Storage(storage)
        self.beat_s, self.expiry_s, self.warn = beat_s, expiry_s, warn
        self._shared: set[Path] = set()  # artifacts known to be in the remote storage

    @property
    def poll_s(self) -> float:
        """Polling interval for an artifact that another process is making, in seconds."""
        return 0.2 if self.storage.remote is None else 2.0

    def lease(self, kind: str, name: str) -> Lease:
        """Return the lease for making an artifact, or several that can only be made together."""
        return self.storage.lease("artifacts/leases", f"{kind}-{name}", beat_s=self.beat_s, expiry_s=self.expiry_s)

    def find(self, kind: str, name: str) -> Path | None:
        """Return the folder of a finished artifact, downloaded from remote storage if needed; None if there is none.

        Raises:
            ArtifactError: It exists but is damaged.
        """
        relative = f"artifacts/{kind}/{name}"
        folder = self.storage.root / relative
        patiently(lambda: None, folder)  # an unreachable storage does not mean a missing artifact
        here = (folder / INFO).exists()
        if not here and not self.storage.pull(relative, last=INFO):
            return None
        check(folder)
        if here and self.storage.remote is not None and folder not in self._shared:
            if not self.storage.holds(f"{relative}/{INFO}"):  # this node's copy is all that is left of it
                self.storage.push(relative, last=INFO)
            self._shared.add(folder)
        return folder

    def get_or_make(
        self,
        kind: str,
        name: str,
        config: ExperimentConfig,
        write: Callable[[Path], Tree],
        needed: Collection[str] = (),
    ) -> Path:
        """Return an artifact; if it is missing or damaged, one of the processes that call this makes it.

        Args:
            kind: ``victims``, ``nulls`` or ``stolen_nulls``.
            name: Its name.
            config: The experiment, stored beside it.
            write: Writes its files into a folder and returns the content of ``info.json``.
            needed: Files that ``write`` must have written.

        Raises:
            ArtifactError: ``write`` left out a file.
        """
        lease = self.lease(kind, name)
        made: list[Path] = []

        def is_there() -> bool:
            try:
                folder = self.find(kind, name)
            except ArtifactError:
                return False  # the process that gets the lease replaces it
            if folder is not None:
                made.append(folder)
            return folder is not None

        while not is_there():
            if not lease.acquire(give_up=is_there, poll_s=self.poll_s):
                break
            try:
                # Another process may have finished between the last check and the lease.
                if not is_there():
                    self._make(kind, name, config, write, needed, lease)
            except LeaseLost as lost:
                self.warn(f"{lost}; what that one makes is used")
            finally:
                lease.release()
        return made[-1]

    def _make(
        self,
        kind: str,
        name: str,
        config: ExperimentConfig,
        write: Callable[[Path], Tree],
        needed: Collection[str],
        lease: Lease,
    ) -> None:
        relative = f"artifacts/{kind}/{name}"
        folder = self.storage.path(relative)
        lease.ensure()
        if folder.exists():
            self.warn(f"{folder} is damaged; it is made again")
            self._remove_damaged(relative)
        for left in folder.parent.glob(f".{name}.*"):
            _remove(left)  # from a process that was killed or is paused: this one has the lease
        aside = folder.with_name(f".{name}.{lease.token}")
        patiently(lambda: aside.mkdir(parents=True, exist_ok=True), aside)
        try:
            try:
                info = write(aside)
                write_yaml(config, aside / "config.yaml")
            except OSError:
                lease.ensure()  # the folder may have been removed by the process that took over
                raise
            missing = sorted(each for each in needed if not (aside / each).is_file())
            lease.ensure()
            if missing:
                raise ArtifactError(f"{kind} {name} was made without {', '.join(missing)}")
            _write_info(aside, {"name": name, "kind": kind, "seed": config.victim.seed, **info})
            lease.ensure()
            patiently(lambda: _publish(aside, folder), folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self.storage.push(relative, last=INFO)
        self._shared.add(folder)

    def _remove_damaged(self, relative: str) -> None:
        """Remove a damaged artifact; restore it if it was made again in the meantime."""
        folder = self.storage.root / relative
        grave = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            folder.rename(grave)
        except FileNotFoundError:
            return
        try:
            check(grave)
        except ArtifactError:
            shutil.rmtree(grave, ignore_errors=True)
            self.storage.delete(relative)
        else:
            _publish(grave, folder)
            raise LeaseLost(f"{folder} was made anew by another process")


def _publish(aside: Path, folder: Path) -> None:
    """Rename a folder to its final name, unless that name exists.

    Raises:
        LeaseLost: The name exists, or the folder itself is gone: another process took over.
    """
    try:
        aside.rename(folder)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT} and not PATIENCE.away:
            raise LeaseLost(f"{folder} was made by another process in the meantime") from error
        raise


def _remove(folder: Path) -> None:
    """Remove a folder that another process may still write to or rename: it is renamed first."""
    grave = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def _write_info(folder: Path, info: Mapping[str, Any]) -> None:
    from mea_ray.core.versions import versions

    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _checksum(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    body = {"schema_version": SCHEMA, **info, "versions": versions(), "files": files}
    write_whole(folder / INFO, json.dumps(body, indent=1, default=str))


def _checksum(path: Path) -> str:
    return patiently(lambda: sha256(path), path)


def read_info(folder: Path) -> dict[str, Any]:
    """Read ``info.json`` of an artifact.

    Raises:
        ArtifactError: It is missing, damaged, or of another schema.
    """
    try:
        info = json.loads(patiently((folder / INFO).read_bytes, folder))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}/{INFO} is not readable: {error}; delete the folder to train it again") from error
    if not isinstance(info, dict) or info.get("schema_version") != SCHEMA:
        raise ArtifactError(f"{folder} is not of artifact schema {SCHEMA}; delete it to train it again")
    return info


def check(folder: Path) -> None:
    """Check every file of an artifact against ``info.json``.

    Raises:
        ArtifactError: A file is missing or was changed, or ``info.json`` does not list its files.
    """
    files = read_info(folder).get("files", {})
    try:
        expected = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
        if not expected:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ArtifactError(f"{folder}/{INFO} does not list its files; delete {folder} to train it again") from None
    for name, (size, checksum) in expected.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or _checksum(path) != checksum:
            raise ArtifactError(f"{path} is missing or damaged; delete {folder} to train it again")
