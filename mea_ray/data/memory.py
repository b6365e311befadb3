"""Checks the free memory before arrays are allocated."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import psutil

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images

_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files of a control group, versions 2 and 1: limit, use, and statistics with the name of the reclaimable cache."""


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that may still be allocated: the machine's, or those of the container if it allows fewer.

    Args:
        cgroup: Folder of the control group.
    """
    free: int = psutil.virtual_memory().available
    for limit, use, statistics, cache in _CGROUPS:
        try:
            lines = dict(line.split() for line in (cgroup / statistics).read_text().splitlines())
            used = int((cgroup / use).read_text()) - int(lines.get(cache, 0))
            free = min(free, max(0, int((cgroup / limit).read_text()) - used))
        except (OSError, ValueError):  # another version, or no limit ("max")
            continue
    return free


def check_memory(what: str, needed: int, remedy: str) -> None:
    """Refuse arrays that do not fit into the free memory.

    Args:
        what: What needs it, in the plural, for the message.
        needed: Bytes.
        remedy: What to do about it.

    Raises:
        DataError: ``needed`` exceeds the free memory.
    """
    free = free_memory()
    if needed > free:
        raise DataError(f"{what} need {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} GiB are free; {remedy}")


def allocate(count: int, shape: tuple[int, ...]) -> Images:
    """Allocate images.

    Args:
        count: Number of images, N.
        shape: (channels, height, width).

    Returns:
        uint8, shape (N, *shape), not initialised.

    Raises:
        DataError: They do not fit into the free memory.
    """
    what = f"{count:,} images of {shape[2]} x {shape[1]} pixels"
    remedy = "set a smaller data.image_size, load fewer images, or map a folder of images with data.in_memory=false"
    check_memory(what, count * math.prod(shape), remedy)
    try:
        return np.empty((count, *shape), np.uint8)
    except (MemoryError, ValueError) as error:  # a limit of the process, or more than an array can hold
        raise DataError(f"{what} do not fit into memory: {error}; {remedy}") from None
