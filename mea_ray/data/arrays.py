"""Datasets in one NumPy file, which a Python program writes for its workers and for later runs."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from mea_ray.core.errors import DataError
from mea_ray.core.types import Dataset, ImageSet, Labels
from mea_ray.data.assemble import warn_of_content
from mea_ray.data.classes import warn_of_names
from mea_ray.data.files import expanded, is_lfs_pointer
from mea_ray.data.memory import check_memory
from mea_ray.storage.files import write_whole

NAMES = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
_UNREADABLE = (
    OSError,
    ValueError,  # arrays of objects are pickled, and never read
    KeyError,
    TypeError,
    EOFError,
    MemoryError,
    RuntimeError,  # encrypted
    NotImplementedError,  # compressed in a way that is not known
    zipfile.BadZipFile,
    zlib.error,
)


def load(*, path: str = "") -> Dataset:
    """Images and labels in one ``.npz`` file.

    Choose it for data that a Python program has in memory.

    Args:
        path: The file, with ``train_images`` and ``test_images`` (uint8, N x C x H x W), ``train_labels`` and
            ``test_labels`` (integers, -1 without a label), and ``class_names`` (strings, one per class).

    Raises:
        DataError: The file is missing or damaged, lacks an array, holds one of another type, or does not fit into
            memory.
    """
    if not path:
        raise DataError("data.path is missing: the .npz file of data.name=arrays")
    where = expanded(path)
    try:
        with zipfile.ZipFile(where) as file:
            headers = dict(_headers(file))
            missing = [name for name in NAMES if name not in headers]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(headers) or 'no arrays'}")
            needed = sum(headers[name] for name in NAMES)
            check_memory(f"the arrays in {path}", needed, "write fewer or smaller images")
        with np.load(where, allow_pickle=False) as content:
            arrays = {name: content[name] for name in NAMES}
    except _UNREADABLE as error:
        if is_lfs_pointer(where):
            raise DataError(f"{path} is a pointer of Git LFS; run `git lfs pull` to download the file") from None
        raise DataError(f"{path} is not a readable .npz file: {error}; check data.path, or write it again") from error
    names = _class_names(path, arrays["class_names"])
    train, test = (_image_set(path, part, arrays, names) for part in ("train", "test"))
    warn_of_content(f"arrays: {path}", train, test)
    warn_of_names(names, f"arrays: {path}")
    return Dataset("arrays", train, test)


def _headers(file: zipfile.ZipFile) -> Iterator[tuple[str, int]]:
    """Yield the name of each array and the bytes that it takes, without reading it."""
    for entry in file.infolist():
        if not entry.filename.endswith(".npy"):
            continue
        with file.open(entry) as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(stream)
        yield entry.filename.removesuffix(".npy"), int(np.prod(shape, dtype=object)) * dtype.itemsize


def _class_names(path: str, names: npt.NDArray[Any]) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(
            f"{path}: class_names must be strings of shape (classes,), got {names.dtype} {names.shape}; write them as "
            "np.array([...], dtype=str)"
        )
    return tuple(map(str, names))


def _image_set(path: str, part: str, arrays: dict[str, npt.NDArray[Any]], names: tuple[str, ...]) -> ImageSet:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if labels.dtype.kind not in "iu" or (len(labels) and int(labels.max()) > np.iinfo(np.int64).max):
        raise DataError(f"{path}: {part}_labels must be integers, got {labels.dtype}; write them as np.int64")
    known: Labels = labels.astype(np.int64)
    try:
        return ImageSet(images, known, names)
    except DataError as error:
        raise DataError(f"{path}: {part}: {error}; write the arrays again") from None


def save_arrays(path: Path, dataset: Dataset) -> None:
    """Write a dataset to the ``.npz`` file that ``load`` reads."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        train_images=dataset.train.images,
        train_labels=dataset.train.labels,
        test_images=dataset.test.images,
        test_labels=dataset.test.labels,
        class_names=np.array(dataset.train.class_names, dtype=np.str_),
    )
    write_whole(path, buffer.getvalue())
