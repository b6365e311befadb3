"""Images that are decoded once on a machine, into a file that later runs map into memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.lib.format import open_memmap

from mea_ray.core import mapped
from mea_ray.core.types import Images
from mea_ray.data.decode import Encoded, decode

SCHEMA = 1
"""Increased when the same files are decoded differently."""


def decode_once(paths: Sequence[Path], image_size: int) -> Images:
    """Decode image files, or map the result of an earlier process that decoded the same files.

    The name of the result is a hash of the paths, sizes and modification times of all images. The file is written
    under another name and then renamed, so that it is always complete.

    Args:
        paths: The files.
        image_size: See ``decode``.

    Returns:
        See ``decode``; mapped from a file, read-only.

    Raises:
        DataError: See ``decode``; or the disk is full.
    """
    whole = mapped.folder() / f"{_name(paths, image_size)}.npy"
    if not whole.exists():
        part, grey = (whole.with_name(f".{whole.name}.{os.getpid()}{suffix}") for suffix in ("", ".grey"))

        def room(count: int, shape: tuple[int, ...]) -> Images:
            mapped.check_disk(count * int(np.prod(shape)))
            return open_memmap(part, mode="w+", dtype=np.uint8, shape=(count, *shape))

        try:
            images = decode((Encoded(str(path), path) for path in paths), len(paths), image_size, room=room)
            if images.shape[1] == 1:  # the file was created for three channels
                into = open_memmap(grey, mode="w+", dtype=np.uint8, shape=images.shape)
                mapped.copy(images, into)
                into.flush()
                grey.replace(whole)
            else:
                part.replace(whole)
        finally:
            part.unlink(missing_ok=True)
            grey.unlink(missing_ok=True)
    stored: Images = np.load(whole, mmap_mode="r", allow_pickle=False)
    return stored


def _name(paths: Sequence[Path], image_size: int) -> str:
    digest = hashlib.sha256(f"{SCHEMA} {image_size} {PIL.__version__}".encode())
    for path in paths:
        status = path.stat()
        digest.update(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]
