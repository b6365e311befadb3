"""A folder that every node can reach: a local or NFS path, or a URI of the file systems that Ray itself uses.

Everything is written to a local folder first. For a path that folder *is* the storage; for a URI it is a cache on this
node, and ``push``/``pull`` move files between the two.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from mea_ray.core.errors import ConfigError
from mea_ray.storage.files import patiently, refusing, write_whole
from mea_ray.storage.lease import FileLease, Lease


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mea_ray"


class Storage:
    """Where results and artifacts are kept.

    Args:
        location: A path, ``file://`` URI, or any URI that ``pyarrow.fs`` knows (``s3://bucket/folder``, ``gs://``,
            ``hdfs://``).
        remote: A ``(pyarrow file system, root path)`` pair to use instead of what ``location`` names.

    Raises:
        ConfigError: The URI names no known file system, or the name of the folder cannot be one.
    """

    def __init__(self, location: str, *, remote: tuple[Any, str] | None = None) -> None:
        _check_name(location)
        self.location = location
        if remote is None and "://" in location:
            remote = _remote(location)
        self.remote = remote
        if remote is not None:
            self.root = _cache_root() / hashlib.sha256(location.encode()).hexdigest()[:16]
        else:
            self.root = Path(location.removeprefix("file://")).expanduser().absolute()
            self.location = str(self.root)  # it goes to processes with other working directories

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which an error of the file system is raised as one that names this storage.

        For the start of a command only: later on, a storage that is full or away is waited for.
        """
        return refusing(f"storage={self.location} cannot be written", "give another (storage=...)")

    def check_writable(self) -> None:
        """Write a small file and remove it again, with every folder that was made for it.

        Raises:
            ConfigError: It cannot be written.
        """
        made: list[Path] = []
        name = f".probe-{uuid.uuid4().hex}"
        try:
            with self.writing():
                made += [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
                write_whole(self.root / name, "probe")
                self.push(name)
                self.delete_file(name)
        finally:
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: another process uses it by now
                    folder.rmdir()

    def lease(self, folder: str, name: str, **timing: Any) -> Lease:
        """Return a lease among all processes that use this storage.

        Args:
            folder: Its folder in the storage.
            name: What is leased.
            timing: ``beat_s``, ``expiry_s`` and ``on_lost``, see `Lease`.
        """
        from mea_ray.storage.remote_lease import RemoteLease

        if self.remote is None:
            return FileLease(self.root / folder, name, **timing)
        system, root = self.remote
        return RemoteLease(system, f"{root}/{folder}", name, **timing)

    def path(self, relative: str) -> Path:
        """Return the local path of ``relative``; its parents exist afterwards."""
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def push(self, relative: str, *, last: str | None = None) -> None:
        """Copy a local file or folder to the remote storage; nothing to do for a path.

        Args:
            relative: What is copied.
            last: Name of the file in it that is copied after all others: its presence says that all is there.
        """
        if self.remote is None:
            return
        local = self.root / relative
        files = [local] if local.is_file() else [p for p in sorted(local.rglob("*")) if p.is_file() and _is_whole(p)]
        for file in sorted(files, key=lambda p: p.name == last):
            patiently(partial(self._upload, file, file.relative_to(self.root).as_posix()), file)

    def pull(self, relative: str, *, last: str | None = None) -> bool:
        """Copy a remote file or folder here unless the files are here already; nothing to do for a path.

        Args:
            relative: What is copied.
            last: A folder counts as present only if it holds this file.

        Returns:
            True if ``relative`` exists in this storage.
        """
        if self.remote is None:
            path = self.root / relative
            return (path / last).exists() if last else path.exists()
        return patiently(lambda: self._pull(relative, last), self.root / relative)

    def _pull(self, relative: str, last: str | None) -> bool:
        assert self.remote is not None
        from pyarrow import fs

        system, root = self.remote
        if last is not None and not self._exists(f"{relative}/{last}"):
            return False
        base = f"{root}/{relative}"
        info = system.get_file_info(base)
        if info.type == fs.FileType.NotFound:
            return False
        infos = [info] if info.type == fs.FileType.File else system.get_file_info(fs.FileSelector(base, recursive=True))
        for item in sorted((i for i in infos if i.type == fs.FileType.File), key=lambda i: i.base_name == last):
            target = self.path(os.path.relpath(item.path, root))
            if target.exists() and target.stat().st_size == item.size:
                continue
            aside = _aside(target)
            with system.open_input_stream(item.path) as source, aside.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            aside.replace(target)
        return True

    def names(self, relative: str) -> list[str]:
        """Return the names of the files in a folder, of the remote storage if there is one; half-written ones are not.

        Args:
            relative: The folder; a missing one is empty.
        """
        if self.remote is None:
            folder = self.root / relative
            return sorted(p.name for p in folder.iterdir() if p.is_file() and _is_whole(p)) if folder.is_dir() else []
        from pyarrow import fs

        system, root = self.remote
        infos = system.get_file_info(fs.FileSelector(f"{root}/{relative}", allow_not_found=True))
        return sorted(i.base_name for i in infos if i.type == fs.FileType.File and not i.base_name.endswith(".part"))

    def delete_file(self, relative: str) -> None:
        """Remove one file here and in the remote storage; a missing one is no error."""
        (self.root / relative).unlink(missing_ok=True)
        if self.remote is not None and self._exists(relative):
            system, root = self.remote
            system.delete_file(f"{root}/{relative}")

    def delete(self, relative: str) -> None:
        """Remove a file or folder here and in the remote storage; missing ones are no error."""
        local = self.root / relative
        if local.is_dir():
            # Renamed first: a reader sees all of the folder or none of it.
            grave = local.with_name(f".{local.name}.{uuid.uuid4().hex}")
            local.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)
        else:
            local.unlink(missing_ok=True)
        if self.remote is not None:
            from pyarrow import fs

            system, root = self.remote
            kind = system.get_file_info(f"{root}/{relative}").type
            if kind == fs.FileType.Directory:
                system.delete_dir(f"{root}/{relative}")
            elif kind == fs.FileType.File:
                system.delete_file(f"{root}/{relative}")

    def _exists(self, relative: str) -> bool:
        from pyarrow import fs

        assert self.remote is not None
        system, root = self.remote
        return bool(system.get_file_info(f"{root}/{relative}").type != fs.FileType.NotFound)

    def _upload(self, file: Path, relative: str) -> None:
        assert self.remote is not None
        system, root = self.remote
        target = f"{root}/{relative}"
        # Object stores show an object only when its stream is closed; others get it aside and renamed.
        aside = f"{target}.{uuid.uuid4().hex}.part"
        system.create_dir(target.rpartition("/")[0], recursive=True)
        with file.open("rb") as source, system.open_output_stream(aside) as sink:
            shutil.copyfileobj(source, sink)
        system.move(aside, target)


def _remote(location: str) -> tuple[Any, str] | None:
    from pyarrow import fs
    from pyarrow.lib import ArrowException

    try:
        system, root = fs.FileSystem.from_uri(location)
    except (ArrowException, ValueError, OSError) as error:
        raise ConfigError(
            f"storage={location!r}: {error}; give a folder, or a URI that pyarrow knows (s3://bucket/folder, gs://...)"
        ) from None
    return None if isinstance(system, fs.LocalFileSystem) else (system, root.rstrip("/"))


def _check_name(location: str) -> None:
    try:
        location.encode()
    except UnicodeEncodeError:
        printable = location.encode(errors="backslashreplace").decode()
        raise ConfigError(f"storage={printable} is not UTF-8; give another (storage=...)") from None
    if "\0" in location:
        raise ConfigError(f"storage={location!r} holds a zero byte; give another (storage=...)")


def _is_whole(path: Path) -> bool:
    return not path.name.startswith(".")


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")
