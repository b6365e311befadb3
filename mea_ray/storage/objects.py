"""Files of a remote storage, with as few requests as its file system permits.

S3, Google Cloud Storage and Azure show an object when its stream is closed, have no folders, and rename by copying.
So a file is written there by one request under its own name. Other file systems (HDFS, a folder that stands for a
remote storage) show a file while it grows: there it is written aside and renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})
PART = ".part"
"""End of the names of files that are being written aside."""


class ObjectInfo(NamedTuple):
    """A file of a remote storage: its size in bytes, and when it was written, in nanoseconds by the storage's clock."""

    size: int
    written_ns: int


def is_object_store(system: Any) -> bool:
    """Whether a file system of ``pyarrow.fs`` is an object store."""
    return system.type_name in OBJECT_STORES


def write_object(system: Any, path: str, content: bytes) -> None:
    """Write a small file whole."""
    with _sink(system, path) as sink:
        sink.write(content)


def upload(system: Any, path: str, file: Path) -> None:
    """Copy a local file."""
    with file.open("rb") as source, _sink(system, path) as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def download(system: Any, path: str, file: Path, entry: ObjectInfo) -> None:
    """Download a file atomically; it gets the time of the remote one, by which it is recognised later."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with system.open_input_stream(path) as source, aside.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        os.utime(aside, ns=(entry.written_ns, entry.written_ns))
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def look(system: Any, path: str) -> ObjectInfo | None:
    """Return the metadata of a file; None if it is missing, or a folder."""
    from pyarrow import fs

    info = system.get_file_info(path)
    return _info(info) if info.type == fs.FileType.File else None


def listing(system: Any, folder: str, *, recursive: bool = True) -> dict[str, ObjectInfo]:
    """Return the files of a folder by their path in it; none if it is missing, and none that is being written."""
    from pyarrow import fs

    infos = system.get_file_info(fs.FileSelector(folder, recursive=recursive, allow_not_found=True))
    return {
        os.path.relpath(info.path, folder): _info(info)
        for info in infos
        if info.type == fs.FileType.File and not info.base_name.endswith(PART)
    }


def read_object(system: Any, path: str) -> bytes | None:
    """Read a small file; None if it is missing."""
    try:
        with system.open_input_stream(path) as source:
            return bytes(source.read())
    except FileNotFoundError:
        return None


def delete_object(system: Any, path: str) -> None:
    """Remove a file; a missing one is no error."""
    with contextlib.suppress(FileNotFoundError):
        system.delete_file(path)


def _info(info: Any) -> ObjectInfo:
    return ObjectInfo(int(info.size), int(info.mtime_ns or 0))


@contextlib.contextmanager
def _sink(system: Any, path: str) -> Any:
    if is_object_store(system):
        with system.open_output_stream(path) as sink:
            yield sink
        return
    aside = f"{path}.{uuid.uuid4().hex}{PART}"
    system.create_dir(path.rpartition("/")[0], recursive=True)
    with system.open_output_stream(aside) as sink:
        yield sink
    system.move(aside, path)
