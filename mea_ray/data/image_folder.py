"""Folders of image files, one folder per class; ImageNet comes like this."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, Images, ImageSet, Labels
from mea_ray.data.decode import Encoded, assemble, check_fraction, check_image_size, decode
from mea_ray.data.splits import stratified

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_TEST_NAMES = ("test", "val", "valid", "validation")
_SPLIT_SEED = 0

Files = list[tuple[Path, int]]


def load(
    *,
    path: str = "",
    image_size: int = 64,
    test_fraction: float = 0.2,
    max_images_per_class: int | None = None,
) -> Dataset:
    """Load ``train/<class>/*.jpg`` with ``test/`` (or ``val/``) beside it, or ``<class>/*.jpg`` alone.

    Images lie in memory: 100 classes of ImageNet at 64 x 64 take 1.6 GB, all of it at 224 x 224 takes 193 GB.

    Args:
        path: Folder with ``train`` and one of ``test``, ``val``, ``valid``, ``validation``, or with the classes.
        image_size: Shorter sides are resized to it, in pixels, and the middle square is cut out.
        test_fraction: Part of the images that becomes test, stratified, when there is no test folder.
        max_images_per_class: Only the first so many files, by name, of each class in each part; null takes all.

    Returns:
        Images of shape (1, image_size, image_size) when all are grey, else (3, image_size, image_size). Classes are
        the sorted names of the folders.

    Raises:
        ConfigError: An option is missing or out of range.
        DataError: A folder is missing or empty, test holds a class that train does not, or an image is damaged.
    """
    check_image_size(image_size)
    check_fraction("test_fraction", test_fraction)
    if max_images_per_class is not None and max_images_per_class < 1:
        raise ConfigError(f"data.max_images_per_class={max_images_per_class} must be at least 1, or null for all")
    if not path:
        raise ConfigError("data.path is empty; give a folder of classes, e.g. data.path=/data/imagenet")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}; check data.path")

    if not (root / "train").is_dir():
        names = _classes(root)
        images, labels = _decode(_files(root, names, max_images_per_class), image_size)
        everything = ImageSet(images, labels, names)
        train, test = stratified(everything, np.arange(len(everything)), test_fraction, _SPLIT_SEED, "test")
        return Dataset("image_folder", everything.take(train), everything.take(test))

    held_out = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if held_out is None:
        raise DataError(
            f"{root} has a folder train but none of {', '.join(_TEST_NAMES)}; add one, or set "
            f"data.path={root / 'train'} to cut test off train by data.test_fraction"
        )
    names = _classes(root / "train")
    if unknown := sorted(set(_classes(held_out)) - set(names)):
        raise DataError(
            f"{held_out} has the class {unknown[0]!r}, which {root / 'train'} has not; their folders must agree"
        )
    parts = [_files(folder, names, max_images_per_class) for folder in (root / "train", held_out)]
    (train_images, train_labels), (test_images, test_labels) = (_decode(files, image_size) for files in parts)
    return assemble("image_folder", train_images, train_labels, test_images, test_labels, names)


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        raise DataError(f"{folder} has no folders; put the images of each class into a folder named after the class")
    return names


def _files(folder: Path, names: tuple[str, ...], most: int | None) -> Files:
    """List (file, label), by class and name."""
    found: Files = []
    for label, name in enumerate(names):
        inside = folder / name
        files = sorted(inside.rglob("*")) if inside.is_dir() else []
        images = [file for file in files if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")][:most]
        if not images:
            raise DataError(f"{inside} holds no images ({', '.join(sorted(EXTENSIONS))}); add some or remove the class")
        found += [(file, label) for file in images]
    return found


def _decode(files: Files, image_size: int) -> tuple[Images, Labels]:
    images = decode((Encoded(str(file), file) for file, _ in files), len(files), image_size)
    return images, np.array([label for _, label in files], np.int64)
