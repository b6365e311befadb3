"""Several datasets in one, for instance a thief's pool of some of the victim's classes among other images."""

from __future__ import annotations

from collections import Counter

import numpy as np
from pydantic import Field

from mea_ray.config.components import DataChoice
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import UNLABELLED, Dataset, ImageSet
from mea_ray.data.memory import allocate
from mea_ray.data.resize import fit

_LIMIT_SEED = 0


class Part(DataChoice):
    """A dataset of a mixture: its ``name``, its own parameters, and ``limit``."""

    limit: int | None = Field(None, ge=1, description="Most training images that are taken, drawn at random.")


def load(*, parts: tuple[Part, ...] = ()) -> Dataset:
    """Join several datasets, for instance a thief's pool of some of the victim's classes among other images.

    Choose it for a thief's pool of several datasets.

    All images are converted to the shape of the first part; grey becomes colour and colour becomes grey as needed.
    Classes are not merged: they are named ``<dataset>/<class>``, as ``digits/3``, or ``digits.2/3`` in the second part
    if several parts are of one dataset. All test images are used.

    Args:
        parts: Datasets by name with their own parameters. ``limit`` is the maximum number of training images
            of a part, drawn at random with a fixed seed:
            ``parts: [{name: cifar10}, {name: digits, limit: 500}, {name: noise}]``.

    Returns:
        Images of the first part's shape. Images without labels in their part have none in the mixture. If a part can
        only be a thief's pool, so can the mixture.

    Raises:
        ConfigError: There are no parts.
        DataError: A part cannot be loaded, or its images cannot be brought to the first one's channels.
    """
    if not parts:
        raise ConfigError("data.parts is empty; list datasets, e.g. data.parts='[{name: digits}, {name: noise}]'")
    loaded: list[Dataset] = [part.build() for part in parts]
    again = Counter(part.name for part in parts)
    titles = [p.name if again[p.name] == 1 else f"{p.name}.{number}" for number, p in enumerate(parts, 1)]
    names = tuple(
        f"{title}/{each}" for title, part in zip(titles, loaded, strict=True) for each in part.train.class_names
    )
    train = [
        _limited(part.train, choice.limit, number)
        for number, (part, choice) in enumerate(zip(loaded, parts, strict=True))
    ]
    reasons = [f"data.parts: {title}: {part.pool_only}" for title, part in zip(titles, loaded, strict=True)]
    pool_only = next((reason for reason, part in zip(reasons, loaded, strict=True) if part.pool_only), "")
    return Dataset("mixture", _joined(train, names), _joined([part.test for part in loaded], names), pool_only)


def _limited(images: ImageSet, limit: int | None, number: int) -> ImageSet:
    if limit is None or limit >= len(images):
        return images
    chosen = numpy_generator(_LIMIT_SEED, "mixture", number).permutation(len(images))[:limit]
    return images.take(np.sort(chosen))


def _joined(parts: list[ImageSet], names: tuple[str, ...]) -> ImageSet:
    images = allocate(sum(map(len, parts)), parts[0].shape)
    labels = np.full(len(images), UNLABELLED, np.int64)
    start = offset = 0
    for part in parts:
        end = start + len(part)
        images[start:end] = fit(part.images, parts[0].shape)
        known = part.labels != UNLABELLED
        labels[start:end][known] = part.labels[known] + offset
        start, offset = end, offset + part.classes
    return ImageSet(images, labels, names)
