"""Images in memory-mapped files, for sets that do not fit in memory.

They behave like arrays: the system reads pages on access, and drops them when memory is short. Processes
of one machine that take the same part of them share one file, so that it takes disk and page cache once.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import shutil
import sys
import tempfile
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import DataError

if sys.platform != "win32":
    import fcntl

_COPIED_AT_ONCE = 1024
"""Number of images in memory at once while mapped ones are copied."""


def folder() -> Path:
    """Return the folder of decoded images on this machine, created if it is missing."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mea_ray" / "images"
    path.mkdir(parents=True, exist_ok=True)
    return path


def is_mapped(images: npt.NDArray[Any]) -> bool:
    """Whether an array is memory-mapped, as a whole or as a view of one that is."""
    base: Any = images
    seen = False
    while base is not None and not isinstance(base, mmap):
        seen = seen or isinstance(base, np.memmap)
        base = getattr(base, "base", None)
    return seen and base is not None  # copies of a mapped array may have its type, and have no file


def check_disk(needed: int) -> None:
    """Reject data that do not fit on the disk of ``folder``.

    Args:
        needed: Bytes.

    Raises:
        DataError: ``needed`` exceeds the free space.
    """
    free = shutil.disk_usage(folder()).free
    if needed > free:
        raise DataError(
            f"decoded images need {needed / 2**30:,.1f} GiB of disk, {free / 2**30:,.1f} GiB are free in {folder()}; "
            "set a smaller data.image_size, or XDG_CACHE_HOME to a larger disk"
        )


def scratch(count: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return room for images in a file without a name: it is gone when the last array on it is.

    Args:
        count: Number of images, N.
        shape: (channels, height, width).

    Returns:
        uint8, shape (N, *shape), zeros.

    Raises:
        DataError: The disk has no room for them.
    """
    size = count * math.prod(shape)
    if not size:
        return np.zeros((count, *shape), np.uint8)
    check_disk(size)
    with tempfile.TemporaryFile(dir=folder()) as file:
        file.truncate(size)
        return np.memmap(file, np.uint8, "r+", shape=(count, *shape))


def shared_part(images: npt.NDArray[np.uint8], indices: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8] | None:
    """Return a part of mapped images in a file that all processes of this machine share, read-only.

    Each process locks the file as long as an array on it lives. Files that nobody locks are removed by the next call.

    Args:
        images: uint8, (N, C, H, W), mapped.
        indices: Positions, (n,), n >= 1.

    Returns:
        uint8, (n, C, H, W); None where the images lie in a file without a name, or the disk has no locks.

    Raises:
        DataError: The disk has no room for them.
    """
    name = _part_name(images, indices)
    if name is None or sys.platform == "win32":
        return None
    # Not every file system passes locks on to the other machines that mount it: each has a folder of its own.
    room = folder().parent / "image_parts" / hashlib.sha256(platform.node().encode()).hexdigest()[:12]
    room.mkdir(parents=True, exist_ok=True)
    _remove_unused(room, name)
    shape = (len(indices), *images.shape[1:])
    size = math.prod(shape)
    while True:
        with open(str(room / name), "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH)
                if os.fstat(file.fileno()).st_size <= size:  # a last byte says that it is whole
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                return None
            if not _is_at(file.fileno(), room / name):
                continue
            if os.fstat(file.fileno()).st_size <= size:
                check_disk(size)
                with open(room / name, "r+b") as into:
                    into.truncate(size)
                    copy(images, np.memmap(into, np.uint8, "r+", shape=shape), indices)
                    into.truncate(size + 1)
            fcntl.flock(file, fcntl.LOCK_SH)
            # The map has a copy of the descriptor, and with it the lock.
            return np.memmap(file, np.uint8, "r", shape=shape)


def _part_name(images: npt.NDArray[np.uint8], indices: npt.NDArray[np.integer]) -> str | None:
    """Return a name that follows from the file and the place of images in it, and from positions."""
    base: Any = images
    while base is not None and not isinstance(getattr(base, "base", None), mmap):
        base = getattr(base, "base", None)
    if getattr(base, "filename", None) is None or not images.flags.c_contiguous:
        return None
    try:
        status = os.stat(base.filename)
    except OSError:
        return None
    offset = images.ctypes.data - base.ctypes.data + base.offset
    known = f"{base.filename} {status.st_ino} {status.st_size} {status.st_mtime_ns} {offset} {images.shape}"
    return hashlib.sha256(known.encode("utf-8", "surrogatepass") + np.asarray(indices, np.int64).tobytes()).hexdigest()


def _remove_unused(room: Path, but: str) -> None:
    """Remove the parts that no process has locked."""
    assert sys.platform != "win32"
    for path in room.iterdir():
        if path.name != but:
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def take(images: npt.NDArray[np.uint8], indices: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """Copy images, (N, C, H, W), at positions (n,): in memory, or as ``shared_part`` does if they come from a file.

    Raises:
        DataError: The disk has no room for them.
    """
    if not is_mapped(images):
        copied: npt.NDArray[np.uint8] = images[indices]
        return copied
    shared = shared_part(images, indices) if len(indices) else None
    if shared is not None:
        return shared
    copies = scratch(len(indices), images.shape[1:])
    copy(images, copies, indices)
    return copies


def copy(
    images: npt.NDArray[np.uint8], into: npt.NDArray[np.uint8], indices: npt.NDArray[np.integer] | None = None
) -> None:
    """Copy images, (N, C, H, W), or those at positions, few at a time."""
    for start in range(0, len(into), _COPIED_AT_ONCE):
        chosen = slice(start, start + _COPIED_AT_ONCE)
        into[chosen] = images[chosen if indices is None else indices[chosen]]
