"""Images in files that are mapped into memory, for sets that memory does not hold.

They behave as arrays: the system reads the pages that are looked at, and drops them when it needs the room.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import DataError

_COPIED_AT_ONCE = 1024
"""Images in memory at once while mapped ones are copied."""


def folder() -> Path:
    """Return the folder of decoded images on this machine, created if it is missing."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mea_ray" / "images"
    path.mkdir(parents=True, exist_ok=True)
    return path


def is_mapped(images: npt.NDArray[Any]) -> bool:
    """Whether an array lies in a file, whole or as a part of one that does."""
    base: Any = images
    seen = False
    while base is not None and not isinstance(base, mmap):
        seen = seen or isinstance(base, np.memmap)
        base = getattr(base, "base", None)
    return seen and base is not None  # copies of a mapped array may have its type, and have no file


def check_disk(needed: int) -> None:
    """Refuse what the disk of ``folder`` has no room for.

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


def take(images: npt.NDArray[np.uint8], indices: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """Copy images, (N, C, H, W), at positions (n,): in memory, or into a file if they come from one.

    Raises:
        DataError: The disk has no room for them.
    """
    if not is_mapped(images):
        copied: npt.NDArray[np.uint8] = images[indices]
        return copied
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
