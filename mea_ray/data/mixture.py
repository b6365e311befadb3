"""Several datasets in one, for instance a thief's pool of some of the victim's classes among other images."""

from __future__ import annotations

from collections import Counter

import numpy as np
from pydantic import Field

from mea_ray.config.components import DataChoice
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.resize import fit

_LIMIT_SEED = 0


class Part(DataChoice):
    """A dataset of a mixture: its ``name``, its own parameters, and ``limit``."""

    limit: int | None = Field(None, ge=1, description="Training images that are taken at most, a random draw.")


def load(*, parts: tuple[Part, ...] = ()) -> Dataset:
    """Put datasets one after the other.

    The images of all parts are brought to the shape of the first one, grey becomes colour and colour grey. Their
    classes stay apart: labels go on where those of the part before end, and names get the dataset's in front, as in
    ``digits/3`` (``digits.2/3`` in the second part, if several are of one dataset). All test images are taken.

    Args:
        parts: Datasets by name with their own parameters; ``limit`` is how many of its training images a part gives at
            most, a random draw that is always the same:
            ``parts: [{name: cifar10}, {name: digits, limit: 500}, {name: noise}]``.

    Returns:
        Images of the first part's shape.

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
    return Dataset("mixture", _joined(train, names), _joined([part.test for part in loaded], names))


def _limited(images: ImageSet, limit: int | None, number: int) -> ImageSet:
    if limit is None or limit >= len(images):
        return images
    chosen = numpy_generator(_LIMIT_SEED, "mixture", number).permutation(len(images))[:limit]
    return images.take(np.sort(chosen))


def _joined(parts: list[ImageSet], names: tuple[str, ...]) -> ImageSet:
    offsets = np.cumsum([0, *(part.classes for part in parts)])
    return ImageSet(
        np.concatenate([fit(part.images, parts[0].shape) for part in parts]),
        np.concatenate([part.labels + offset for part, offset in zip(parts, offsets, strict=False)]),
        names,
    )
