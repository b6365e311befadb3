"""Victims and null models as artifacts: named by all that made them, trained once, never half-written.

An artifact is a folder ``artifacts/<kind>/<name>`` of the storage with ``model.safetensors``, ``model.json``, for
victims ``key.json`` (and ``key.safetensors``), ``config.yaml`` (the resolved config) and ``info.json`` (seed, package
versions, history, checksums). ``info.json`` is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mea_ray.config import ExperimentConfig, Tree, write_yaml
from mea_ray.core.errors import ArtifactError
from mea_ray.storage.files import patiently, write_whole
from mea_ray.storage.lease import Lease
from mea_ray.storage.remote import Storage

SCHEMA = 1


class Store:
    """The artifacts of a storage location.

    Args:
        storage: Folder or URI, or a ``Storage``.
        beat_s: Seconds between heartbeats of a process that trains.
        expiry_s: Seconds of silence after which a training process counts as dead and another one takes over.
        warn: Called with a sentence when a damaged artifact is made again.
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

    def find(self, kind: str, name: str) -> Path | None:
        """Return the folder of a finished artifact, fetched from the remote storage if need be; None if there is none.

        Raises:
            ArtifactError: It is there but damaged.
        """
        relative = f"artifacts/{kind}/{name}"
        folder = self.storage.root / relative
        patiently(lambda: None, folder)  # what is away is not missing
        if not (folder / "info.json").exists() and not self.storage.pull(relative, last="info.json"):
            return None
        check(folder)
        return folder

    def get_or_make(self, kind: str, name: str, config: ExperimentConfig, write: Callable[[Path], Tree]) -> Path:
        """Return an artifact, made by ``write(folder) -> info`` in one process if it is missing or damaged."""
        lease = Lease(
            self.storage.path("artifacts/leases/x").parent, f"{kind}-{name}", beat_s=self.beat_s, expiry_s=self.expiry_s
        )
        found: list[Path] = []

        def is_there() -> bool:
            try:
                folder = self.find(kind, name)
            except ArtifactError:
                return False  # replaced by whoever gets the lease
            if folder is not None:
                found.append(folder)
            return folder is not None

        poll_s = 0.2 if self.storage.remote is None else 2.0
        if is_there() or not lease.acquire(give_up=is_there, poll_s=poll_s):
            return found[-1]
        try:
            # Another process may have finished between the last look and the lease.
            return found[-1] if is_there() else self._make(kind, name, config, write)
        finally:
            lease.release()

    def _make(self, kind: str, name: str, config: ExperimentConfig, write: Callable[[Path], Tree]) -> Path:
        relative = f"artifacts/{kind}/{name}"
        folder = self.storage.path(relative)
        if folder.exists():
            self.warn(f"{folder} is damaged; it is made again")
            self.storage.delete(relative)
        for left in folder.parent.glob(f".{name}.*"):
            shutil.rmtree(left, ignore_errors=True)  # of a trainer that was killed: this process holds the lease
        aside = folder.with_name(f".{name}.{uuid.uuid4().hex[:8]}")
        patiently(lambda: aside.mkdir(parents=True, exist_ok=True), aside)
        try:
            info = write(aside)
            write_yaml(config, aside / "config.yaml")
            _write_info(aside, {"name": name, "kind": kind, "seed": config.victim.seed, **info})
            patiently(lambda: aside.rename(folder), folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self.storage.push(relative, last="info.json")
        return folder


def _write_info(folder: Path, info: Mapping[str, Any]) -> None:
    from mea_ray.core.versions import versions

    files = {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}
    body = {"schema_version": SCHEMA, **info, "versions": versions(), "sha256": files}
    write_whole(folder / "info.json", json.dumps(body, indent=1, default=str))


def _checksum(path: Path) -> str:
    def read() -> str:
        with path.open("rb") as file:
            hasher = hashlib.sha256()
            while block := file.read(1 << 20):
                hasher.update(block)
        return hasher.hexdigest()

    return patiently(read, path)


def read_info(folder: Path) -> dict[str, Any]:
    """Read ``info.json`` of an artifact.

    Raises:
        ArtifactError: It is missing, damaged, or of another schema.
    """
    try:
        info = json.loads(patiently((folder / "info.json").read_bytes, folder))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder}/info.json is not readable: {error}; delete the folder to train it again"
        ) from error
    if not isinstance(info, dict) or info.get("schema_version") != SCHEMA:
        raise ArtifactError(f"{folder} is not of artifact schema {SCHEMA}; delete it to train it again")
    return info


def check(folder: Path) -> None:
    """Compare every file of an artifact with its checksum.

    Raises:
        ArtifactError: A file is missing or was changed.
    """
    for name, expected in read_info(folder)["sha256"].items():
        path = folder / name
        if not path.is_file() or _checksum(path) != expected:
            raise ArtifactError(f"{path} is missing or damaged; delete {folder} to train it again")
