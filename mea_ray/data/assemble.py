"""Makes datasets from decoded images; those without labels or a test part can only be a thief's pool."""

from __future__ import annotations

import numpy as np

from mea_ray.core.errors import DataError
from mea_ray.core.types import UNLABELLED, Dataset, Images, ImageSet
from mea_ray.data.resize import fit
from mea_ray.data.skipped import warn
from mea_ray.data.splits import stratified

_SPLIT_SEED = 0
_MANY_COPIES = 0.05
"""Fraction of copies in train above which a warning is logged."""


def unlabelled(images: Images) -> ImageSet:
    """Return images without labels and classes."""
    return ImageSet(images, np.full(len(images), UNLABELLED, np.int64), ())


def assemble(name: str, train: ImageSet, test: ImageSet, where: str) -> Dataset:
    """Make a dataset of two parts; a grey part beside a colour part becomes colour.

    A warning counts images that are in both parts, in two classes, or repeated.

    Args:
        name: Name in the table of datasets.
        train: Training images.
        test: Test images.
        where: The folder or file that was read, for the warning.

    Raises:
        DataError: The parts differ in image size.
    """
    if train.images.shape[2:] != test.images.shape[2:]:
        raise DataError(
            f"train images are {train.images.shape[3]} x {train.images.shape[2]} pixels, test images "
            f"{test.images.shape[3]} x {test.images.shape[2]}; set data.image_size to resize all to one size"
        )
    channels = max(train.images.shape[1], test.images.shape[1])
    shape = (channels, train.images.shape[2], train.images.shape[3])
    dataset = Dataset(
        name,
        ImageSet(fit(train.images, shape), train.labels, train.class_names),
        ImageSet(fit(test.images, shape), test.labels, test.class_names),
    )
    warn_of_content(f"{name}: {where}", dataset.train, dataset.test)
    return dataset


def warn_of_content(where: str, train: ImageSet, test: ImageSet) -> None:
    """Warn of images that are repeated, in both parts or in two classes, and of pixels that are only 0 or 1.

    Images are compared pixel by pixel.

    Args:
        where: What was read, for the warnings.
        train: Training images.
        test: Test images.
    """
    in_test = {hash(image.tobytes()) for image in test.images}
    in_train = [hash(image.tobytes()) for image in train.images]
    if repeated := in_test.intersection(in_train):
        warn(
            f"{where}: {len(repeated):,} different images in test are in train, too; accuracy on them says nothing "
            "about other images, remove the copies"
        )
    labels: dict[int, set[int]] = {}
    for image, label in zip(in_train, train.labels.tolist(), strict=True):
        labels.setdefault(image, set()).add(label)
    copies = len(in_train) - len(labels)
    if copies > _MANY_COPIES * len(in_train):
        warn(f"{where}: {copies:,} of the {len(in_train):,} images in train are copies of others; remove the copies")
    if several := sum(len(known) > 1 for known in labels.values()):
        warn(f"{where}: {several:,} different images in train are in two classes or more; give each one class")
    # An ordinary image ends the search at once, so that few images are read again.
    if all(image.max(initial=0) <= 1 for image in train.images) and train.images.any():
        warn(f"{where}: all pixels in train are 0 or 1, and 255 is white; multiply them by 255")


def cut(name: str, images: ImageSet, fraction: float, where: str) -> Dataset:
    """Split off a stratified test part with a fixed seed.

    If a class has fewer than two images, all remain in train and the dataset can only be a pool.

    Args:
        name: Name in the table of datasets.
        images: All images, each with a label.
        fraction: Fraction of each class that becomes test, in (0, 1).
        where: See ``assemble``.
    """
    try:
        train, test = stratified(images, np.arange(len(images)), fraction, _SPLIT_SEED, "test")
    except DataError as error:
        return pool(name, images, str(error))
    return assemble(name, images.take(train), images.take(test), where)


def pool(name: str, images: ImageSet, reason: str) -> Dataset:
    """Make a dataset without a test part, which can only be a thief's pool.

    Args:
        name: Name in the table of datasets.
        images: All images; labels may be missing.
        reason: What is missing, and what to do about it.
    """
    return Dataset(name, images, images.take(np.arange(0)), reason)
