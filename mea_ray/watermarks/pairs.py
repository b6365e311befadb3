"""The source images of watermark samples, and mixes to compare the samples with.

With them a proof can tell how many independent images it rests on, whether the key's own mixes stand out, and how the
key ranks among the keys that could have been drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
import torch

from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Labels
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.combiners.base import Combiner, to_uint8
from mea_ray.watermarks.mixed_classes import MixedClasses, as_float

Positions = npt.NDArray[np.int64]

MOST_PAIRED = 150
"""Mixes in each other geometry."""
MOST_OF_A_PAIR = 10
"""Mixes of each ordered pair of classes."""
MOST_OF_ALL_PAIRS = 5000
"""Mixes of all pairs of classes together. With too many classes for two mixes each, there are none."""
MOST_CLEAN = 100
"""Clean images of each class."""


@dataclass(frozen=True)
class MixedPairs:
    """Mixes with their source images, by position in the held-out set.

    Attributes:
        positions: Source images of each watermark sample, int64 (n, 2), in the order of ``WatermarkSamples.images``.
        otherwise: For each other geometry, the first m of these pairs mixed that way, uint8 (m, C, H, W).
        every_pair: Mixes of all ordered pairs of classes in the key's geometry, uint8 (k, C, H, W); empty with too many
            classes.
        every_otherwise: The same pairs mixed in each other geometry that the key could have been drawn with, uint8
            (k, C, H, W); empty if the geometry was not drawn.
        every_classes: Their source classes, int64 (k, 2).
        every_positions: Their source images, int64 (k, 2).
        clean: Clean held-out images of all classes, uint8 (c, C, H, W).
        clean_labels: Their labels, int64 (c,).
        source_classes: The key's source classes.
        geometry: Name of the key's geometry.
    """

    positions: Positions
    otherwise: Mapping[str, Images]
    every_pair: Images
    every_otherwise: Mapping[str, Images]
    every_classes: Positions
    every_positions: Positions
    clean: Images
    clean_labels: Labels
    source_classes: tuple[int, int]
    geometry: str


def mixed_pairs(key: Key, held_out: ImageSet, count: int, seed: int) -> MixedPairs:
    """Trace the samples of ``MixedClasses.samples`` to their source images, and mix what they are compared with.

    Args:
        key: A key of a scheme that mixes two classes.
        held_out: As for ``samples``.
        count: As for ``samples``.
        seed: As for ``samples``.

    Raises:
        ArtifactError: The key is not one of such a scheme.
    """
    combiner, others = MixedClasses.combiners(key)
    first, second = (np.flatnonzero(held_out.labels == label) for label in key.source_classes)
    stream = derive(seed, "watermark")
    possible = len(first) * len(second)
    chosen = numpy_generator(stream, "pairs").choice(possible, size=min(count, possible), replace=False)
    positions = np.stack([first[chosen // len(second)], second[chosen % len(second)]], 1)
    mixes = _mixed(combiner, held_out, positions, stream)
    _, distinct = np.unique(mixes.reshape(len(mixes), -1), axis=0, return_index=True)
    positions = positions[np.sort(distinct)]
    part = positions[:MOST_PAIRED]
    stream = derive(seed, "every pair")
    every_classes, every_positions = _every_pair(held_out, stream)
    drawn = others if key.draw.get("admissible", {}).get("geometries") else {}
    clean = np.concatenate([np.flatnonzero(held_out.labels == label)[:MOST_CLEAN] for label in range(held_out.classes)])
    return MixedPairs(
        positions=positions,
        otherwise={name: _mixed(each, held_out, part, derive(seed, "paired", name)) for name, each in others.items()},
        every_pair=_mixed(combiner, held_out, every_positions, stream),
        every_otherwise={name: _mixed(each, held_out, every_positions, stream) for name, each in drawn.items()},
        every_classes=every_classes,
        every_positions=every_positions,
        clean=held_out.images[clean],
        clean_labels=held_out.labels[clean],
        source_classes=key.source_classes,
        geometry=key.settings["combiner"],
    )


def _every_pair(held_out: ImageSet, seed: int) -> tuple[Positions, Positions]:
    """Draw source images of every ordered pair of classes that have images: classes and positions, int64 (k, 2)."""
    of_class = {int(label): np.flatnonzero(held_out.labels == label) for label in np.unique(held_out.labels)}
    pairs = np.array(list(permutations(of_class, 2)), np.int64).reshape(-1, 2)
    each = min(MOST_OF_A_PAIR, MOST_OF_ALL_PAIRS // max(1, len(pairs)))
    if each < 2:
        pairs, each = pairs[:0], 0
    rng = numpy_generator(seed, "positions")
    classes = np.repeat(pairs, each, axis=0)
    drawn = [[rng.choice(of_class[int(label)], size=each) for label in pair] for pair in pairs]
    positions = np.concatenate([np.stack(sides, 1) for sides in drawn]) if drawn else classes.copy()
    return classes, positions


def _mixed(combiner: Combiner, held_out: ImageSet, positions: Positions, seed: int) -> Images:
    """Mix pairs of held-out images: uint8 (k, C, H, W)."""
    if not len(positions):
        return held_out.images[:0]
    generator = torch.Generator().manual_seed(derive(seed, "mixes"))
    first, second = (as_float(held_out.images[side]) for side in positions.T)
    mixes: Images = to_uint8(combiner(first, second, generator)).numpy()
    return mixes
