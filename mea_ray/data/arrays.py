"""Datasets in one NumPy file: what a Python program has in memory, written once for workers and for later."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from mea_ray.core.errors import DataError
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.storage.files import write_whole

NAMES = ("train_images", "train_labels", "test_images", "test_labels", "class_names")


def load(*, path: str = "") -> Dataset:
    """Images and labels in one ``.npz`` file.

    Choose it for data that a Python program has in memory.

    Args:
        path: The file, with ``train_images`` and ``test_images`` (uint8, N x C x H x W), ``train_labels`` and
            ``test_labels`` (integers), and ``class_names`` (strings).

    Raises:
        DataError: The file is missing, damaged, or lacks an array.
    """
    if not path:
        raise DataError("data.path is missing: the .npz file of data.name=arrays")
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as content:
            missing = [name for name in NAMES if name not in content]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(content)}")
            arrays = {name: content[name] for name in NAMES}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable .npz file: {error}; check data.path, or write it again") from error
    names = tuple(map(str, arrays["class_names"]))
    train, test = (
        ImageSet(arrays[f"{part}_images"], arrays[f"{part}_labels"].astype(np.int64), names)
        for part in ("train", "test")
    )
    return Dataset("arrays", train, test)


def save_arrays(path: Path, dataset: Dataset) -> None:
    """Write a dataset as such a file."""
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
