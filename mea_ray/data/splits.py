"""Division of a dataset among owner, thief and verifier: stratified, deterministic, disjoint by construction."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Dataset, ImageSet, Splits
from mea_ray.data.resize import fit

Indices = npt.NDArray[np.int64]


def make_splits(
    dataset: Dataset,
    *,
    validation_fraction: float = 0.05,
    verification_fraction: float = 0.2,
    thief_pool: Literal["train", "disjoint"] | Dataset = "train",
    disjoint_fraction: float = 0.5,
    verification_minimum: int = 36,
    held_out: Literal["test", "validation"] = "test",
    seed: int = 0,
) -> Splits:
    """Divide a dataset among the owner, the thief, the verifier and the final test.

    Every cut takes its fraction of every class, and at least one image; images keep their order. Train is cut into the
    victim's training and validation images (after the thief's part is taken away, under ``disjoint``); test is cut into
    verification and test. Verification is therefore disjoint from everything that any model is trained on.

    While settings are chosen, ``held_out="validation"``, the validation images take the place of test, and the images
    of test are not used at all.

    Args:
        dataset: Published train and test images.
        validation_fraction: Of the owner's train, in (0, 1).
        verification_fraction: Of test, in (0, 1).
        thief_pool: ``"train"``: all the owner's train images, the paper's setting. ``"disjoint"``: a part of train
            that the owner never sees. Another dataset: its train images, brought to the victim's shape.
        disjoint_fraction: Of train, in (0, 1): the thief's part under ``disjoint``.
        verification_minimum: Minimum number of verification images of each class, or half of the class's test images
            if that is fewer. 36 of each source make 1296 distinct pairs, enough for 1,000 watermark samples.
        held_out: What verification and test are cut from. Under ``"validation"`` the pool ``"train"`` is the victim's
            training images alone, so that no thief trains on images that it is tested on.
        seed: Seed of all cuts.

    Returns:
        The five parts, and the fingerprints of the datasets that they come from. Images of the pool may lack labels.

    Raises:
        ConfigError: A fraction lies outside (0, 1).
        DataError: The dataset lacks labels or a test part, a class is too small for each part to get an image of it,
            or the pool is empty or cannot be converted.
    """
    _check_complete(dataset)
    for name, value in {
        "validation_fraction": validation_fraction,
        "verification_fraction": verification_fraction,
        "disjoint_fraction": disjoint_fraction,
    }.items():
        if not 0 < value < 1:
            raise ConfigError(f"splits.{name}={value} must lie between 0 and 1, both excluded")

    owner = np.arange(len(dataset.train))
    pool = dataset.train
    if isinstance(thief_pool, Dataset):
        other = thief_pool.train
        if not len(other):
            raise DataError(f"splits.thief_pool={thief_pool.name} has no training images; give it some")
        pool = ImageSet(fit(other.images, dataset.train.shape), other.labels, other.class_names)
    elif thief_pool == "disjoint":
        owner, thief = stratified(dataset.train, owner, disjoint_fraction, seed, "disjoint", parts=3)
        pool = dataset.train.take(thief)
    elif thief_pool != "train":
        raise ConfigError(f"splits.thief_pool={thief_pool!r} must be 'train', 'disjoint' or a dataset")

    training, validation = stratified(dataset.train, owner, validation_fraction, seed, "validation")
    judged, everything = dataset.test, np.arange(len(dataset.test))
    if held_out == "validation":
        judged, everything = dataset.train, validation
        pool = dataset.train.take(training) if thief_pool == "train" else pool
    test, verification = stratified(
        judged, everything, verification_fraction, seed, "verification", minimum=verification_minimum
    )
    return Splits(
        victim_train=dataset.train.take(training),
        victim_validation=dataset.train.take(validation),
        thief_pool=pool,
        verification=judged.take(verification),
        test=judged.take(test),
        fingerprint=dataset.fingerprint,
        pool_fingerprint=thief_pool.fingerprint if isinstance(thief_pool, Dataset) else None,
    )


def _check_complete(dataset: Dataset) -> None:
    """Refuse a dataset that can only be a thief's pool."""
    if dataset.pool_only:
        raise DataError(dataset.pool_only)
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        if not len(part) or not part.labelled:
            raise DataError(
                f"{dataset.name} has {len(part)} {name} images, {int((part.labels < 0).sum())} of them without a "
                "label; data needs labelled images in both parts (a thief's pool, splits.thief_pool, does not)"
            )


def stratified(
    images: ImageSet,
    indices: Indices,
    fraction: float,
    seed: int,
    name: str,
    *,
    minimum: int = 1,
    parts: int = 2,
) -> tuple[Indices, Indices]:
    """Cut ``indices`` in two so that the second part holds ``fraction`` of every class.

    Args:
        images: The images that the indices refer to.
        indices: Distinct positions in ``images``.
        fraction: Share of the second part, in (0, 1).
        seed: Seed of the draw.
        name: Name of the second part, for the random stream and the error.
        minimum: Minimum number of images of each class in the second part, or half of the class if that is fewer.
        parts: Total number of parts that each class is cut into, and the minimum number of its images.

    Returns:
        Both parts, each sorted, disjoint, together ``indices``. Both hold every class.

    Raises:
        DataError: A class has fewer images than ``parts``.
    """
    labels = images.labels[indices]
    generator = numpy_generator(seed, "splits", name)
    chosen: list[Indices] = []
    for label, class_name in enumerate(images.class_names):
        members = indices[labels == label]
        if len(members) < parts:
            raise DataError(
                f"class {class_name!r} (label {label}) has {len(members)} images, the {name} split needs at least "
                f"{parts}; add images or drop the class"
            )
        count = max(round(fraction * len(members)), min(minimum, len(members) // 2))
        # The first part keeps as many images as there are cuts still to come.
        count = min(max(count, 1), len(members) - (parts - 1))
        chosen.append(generator.permutation(members)[:count])
    second = np.sort(np.concatenate(chosen)).astype(np.int64)
    return np.setdiff1d(indices, second, assume_unique=True).astype(np.int64), second
