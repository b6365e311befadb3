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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mea_ray.core.errors import ConfigError
from mea_ray.storage import objects, segments
from mea_ray.storage.files import at_home, patiently, refusing, write_whole
from mea_ray.storage.lease import FileLease, Lease

_GCS_RETRY_S = 30.0
IDENTITY = "folder.id"
"""File with the id of a remote folder, see `Storage.claim_cache`."""


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mea_ray"


class Storage:
    """The storage of results and artifacts.

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
        self._same: dict[str, tuple[int, int]] = {}  # local files that are as in the remote storage
        self._grown: dict[str, int] = {}  # bytes of growing files that are in the remote storage
        if remote is not None:
            self.root = _cache_root() / hashlib.sha256(location.encode()).hexdigest()[:16]
        else:
            self.root = at_home(location.removeprefix("file://"), "storage").absolute()
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
        """Copy a local file, or what is new in a folder, to the remote storage; nothing to do for a path.

        Args:
            relative: What is copied. A file that this object has copied or fetched, and that has not changed since, is
                not copied again.
            last: Name of the file in it that is copied after all others: its presence says that all is there.
        """
        if self.remote is None:
            return
        local = self.root / relative
        files = [local] if local.is_file() else [p for p in sorted(local.rglob("*")) if p.is_file() and _is_whole(p)]
        for file in sorted(files, key=lambda p: p.name == last):
            name = file.relative_to(self.root).as_posix()
            state = _state(file)
            if self._same.get(name) != state:
                self.push_as(file, name)
                self._same[name] = state

    def push_as(self, file: Path, relative: str) -> None:
        """Copy a local file of any name to the remote storage; nothing to do for a path."""
        if self.remote is not None:
            system, root = self.remote
            patiently(partial(objects.upload, system, f"{root}/{relative}", file), file)

    def pull(self, relative: str, *, last: str | None = None) -> bool:
        """Copy a remote file or folder here, less what is here already; nothing to do for a path.

        Args:
            relative: What is copied. `pull_folder` needs fewer requests for what is known to be a folder.
            last: The file of a folder without which it does not count as present.

        Returns:
            True if ``relative`` exists in this storage.
        """
        if self.remote is None:
            path = self.root / relative
            return (path / last).exists() if last else path.exists()
        if last is not None:
            return self.pull_folder(relative, last=last)
        return self.pull_file(relative) or self.pull_folder(relative)

    def pull_file(self, relative: str) -> bool:
        """Copy a remote file here, unless it is here already; returns whether it exists in this storage."""
        if self.remote is None:
            return (self.root / relative).is_file()

        def fetch() -> bool:
            entry = objects.look(*self._at(relative))
            if entry is not None:
                self._fetch(relative, entry)
            return entry is not None

        return patiently(fetch, self.root / relative)

    def pull_folder(self, relative: str, *, last: str | None = None, only: str | None = None) -> bool:
        """Copy a remote folder here, less what is here already.

        Args:
            relative: The folder.
            only: Name of the files that are wanted, in whatever folder they are; all when None.
            last: The file without which it does not count as present; it is copied after all others.

        Returns:
            True if the folder exists in this storage and holds ``last``.
        """
        if self.remote is None:
            return self.pull(relative, last=last)

        def fetch() -> bool:
            files = objects.listing(*self._at(relative))
            if not files or (last is not None and last not in files):
                return False
            wanted = [name for name in files if only is None or name.rpartition("/")[2] == only]
            for name in sorted(wanted, key=lambda each: each == last):
                self._fetch(f"{relative}/{name}", files[name])
            return True

        return patiently(fetch, self.root / relative)

    def push_grown(self, relative: str) -> None:
        """Copy what was appended to a local file since this object did so last, as one more segment beside the others.

        The segments are in the folder ``<relative>.d`` of the remote storage, each named by the bytes that it holds of
        the file. Nothing to do for a path.
        """
        if self.remote is None:
            return
        system, root = self.remote
        start = self._grown.get(relative, 0)

        def send() -> int:
            with (self.root / relative).open("rb") as file:
                file.seek(start)
                content = file.read()
            if content:
                name = segments.name(start, start + len(content))
                objects.write_object(system, f"{root}/{relative}.d/{name}", content)
            return start + len(content)

        self._grown[relative] = patiently(send, self.root / relative)

    def pull_grown(self, relative: str, *, to_go_on: bool = False) -> None:
        """Append to a local file what it lacks of the segments that `push_grown` made; nothing to do for a path.

        Args:
            relative: The file.
            to_go_on: This process will append to it: all is read and compared, and a local file that does not begin
                with what the segments hold is replaced. Another machine may have gone on with it meanwhile.
        """
        if self.remote is None:
            return
        system, root = self.remote
        path = self.path(relative)

        def fetch() -> int:
            folder = f"{root}/{relative}.d"
            here = path.stat().st_size if path.exists() and not to_go_on else 0
            first, content = here, bytearray()
            for start, name in segments.missing(objects.listing(system, folder, recursive=False), here):
                first = min(first, start)
                del content[start - first :]
                content += objects.read_object(system, f"{folder}/{name}") or b""
            if not to_go_on or not (path.exists() and path.read_bytes().startswith(content)):
                with path.open("r+b" if path.exists() else "wb") as file:
                    file.seek(first)
                    file.write(content)
                    file.truncate()
            return first + len(content)

        self._grown[relative] = patiently(fetch, path)

    def merge_grown(self, relative: str) -> None:
        """Put the segments of a file that will grow no more into one; nothing to do for a path."""
        if self.remote is None:
            return
        system, root = self.remote
        folder, path = f"{root}/{relative}.d", self.root / relative
        files = objects.listing(system, folder, recursive=False)
        whole = segments.name(0, path.stat().st_size)
        if len(files) > 1 and whole not in files:
            objects.upload(system, f"{folder}/{whole}", path)
            for name in files:
                objects.delete_object(system, f"{folder}/{name}")

    def claim_cache(self, relative: str, *, make: bool = False) -> str:
        """Empty this node's copy of a remote folder if it is a copy of another folder with the same name.

        The remote folder is identified by an id in its file ``folder.id``. A sweep that was deleted and started again
        has another id, so that no node confuses its old files with the new ones.

        Args:
            relative: The folder.
            make: Give a folder without an id one.

        Returns:
            The id, for `adopt_cache` in other processes; empty for a path, or if the folder has none.
        """
        if self.remote is None:
            return ""
        system, path = self._at(f"{relative}/{IDENTITY}")
        owner = patiently(partial(objects.read_object, system, path), self.root / relative)
        if owner is None and not make:
            self.discard_cache(relative)
            return ""
        identity = uuid.uuid4().hex if owner is None else owner.decode().strip()
        if owner is None:
            patiently(partial(objects.write_object, system, path, identity.encode()), self.root / relative)
        self.adopt_cache(relative, identity)
        return identity

    def adopt_cache(self, relative: str, identity: str) -> None:
        """Empty this node's copy of a remote folder if it is not a copy of the one with this id."""
        if self.remote is None or not identity:
            return
        folder = self.root / relative
        with _locked(self.root / ".locks", relative):
            if _read_text(folder / IDENTITY) == identity:
                return
            self._empty(folder)
            write_whole(folder / IDENTITY, identity)

    def discard_cache(self, relative: str) -> None:
        """Remove this node's copy of a folder that the remote storage does not hold; nothing to do for a path."""
        if self.remote is not None:
            with _locked(self.root / ".locks", relative):
                self._empty(self.root / relative)

    def _empty(self, folder: Path) -> None:
        self._same.clear()
        self._grown.clear()
        if folder.is_dir():
            grave = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            folder.rename(grave)  # at once, for a process that still writes into it
            shutil.rmtree(grave, ignore_errors=True)

    def holds(self, relative: str) -> bool:
        """Whether a file exists in this storage, regardless of this node's cache."""
        if self.remote is None:
            return (self.root / relative).exists()
        return objects.look(*self._at(relative)) is not None

    def names(self, relative: str) -> list[str]:
        """Return the names of the files in a folder, of the remote storage if there is one; half-written ones are not.

        Args:
            relative: The folder; a missing one is empty.
        """
        if self.remote is None:
            folder = self.root / relative
            return sorted(p.name for p in folder.iterdir() if p.is_file() and _is_whole(p)) if folder.is_dir() else []
        return sorted(objects.listing(*self._at(relative), recursive=False))

    def delete_file(self, relative: str) -> None:
        """Remove one file here and in the remote storage; a missing one is no error."""
        (self.root / relative).unlink(missing_ok=True)
        self._same.pop(relative, None)
        if self.remote is not None:
            objects.delete_object(*self._at(relative))

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

    def _at(self, relative: str) -> tuple[Any, str]:
        assert self.remote is not None
        system, root = self.remote
        return system, f"{root}/{relative}"

    def _fetch(self, relative: str, entry: objects.ObjectInfo) -> None:
        """Copy one remote file here, unless what is here was copied from it or to it."""
        file = self.path(relative)
        if file.exists():
            size, changed_ns = state = _state(file)
            if size == entry.size and (changed_ns == entry.written_ns or self._same.get(relative) == state):
                self._same[relative] = state
                return
        objects.download(*self._at(relative), file, entry)
        self._same[relative] = _state(file)


def _remote(location: str) -> tuple[Any, str] | None:
    from pyarrow import fs
    from pyarrow.lib import ArrowException

    try:
        system, root = fs.FileSystem.from_uri(_with_options(location))
    except (ArrowException, ValueError, OSError) as error:
        raise ConfigError(
            f"storage={location!r}: {error}; give a folder, or a URI that pyarrow knows (s3://bucket/folder, gs://...)"
        ) from None
    if isinstance(system, fs.LocalFileSystem):
        return None
    if not root.strip("/"):
        raise ConfigError(f"storage={location!r} names no bucket; give one, and a folder in it (s3://bucket/folder)")
    return system, root.rstrip("/")


def _with_options(location: str) -> str:
    """Set options of a file system that its defaults do not suit.

    A small file is written to S3 by one request and not by the three of an upload in parts. Google's client gives an
    answer within seconds, and not after 15 minutes, where nobody can be reached.
    """
    import pyarrow

    if location.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in location:
        return f"{location}{'&' if '?' in location else '?'}retry_limit_seconds={_GCS_RETRY_S:g}"
    option = "allow_delayed_open"
    if not location.startswith("s3://") or option in location or int(pyarrow.__version__.partition(".")[0]) < 17:
        return location
    return f"{location}{'&' if '?' in location else '?'}{option}=true"


def _check_name(location: str) -> None:
    try:
        location.encode()
    except UnicodeEncodeError:
        readable = location.encode(errors="backslashreplace").decode()
        raise ConfigError(f"storage={readable} is not UTF-8; give another (storage=...)") from None
    if "\0" in location:
        raise ConfigError(f"storage={location!r} holds a zero byte; give another (storage=...)")


def _is_whole(path: Path) -> bool:
    return not path.name.startswith(".")


def _state(path: Path) -> tuple[int, int]:
    """Return size and time of change of a local file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Lock out the other processes of this node."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / hashlib.sha256(name.encode()).hexdigest()[:16]):
        yield
