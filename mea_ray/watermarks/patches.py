"""Functions shared by watermarks that are a patch on an image: pattern triggers and the entangled watermark."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.watermarks.base import Key, WatermarkSamples

Pattern = npt.NDArray[np.float32]
"""float32 (C, h, w) in [0, 1]."""


def drawn_pattern(channels: int, size: int, seed: int) -> Pattern:
    """Draw a pattern of black and white pixels, different in each channel: float32 (channels, size, size)."""
    return numpy_generator(seed, "pattern").integers(0, 2, (channels, size, size)).astype(np.float32)


def stamped(images: Images, pattern: Pattern, corner: tuple[int, int]) -> Images:
    """Put a pattern on copies of images.

    Args:
        images: uint8 (N, C, H, W).
        pattern: What is put there.
        corner: Row and column of its first pixel.

    Returns:
        uint8 (N, C, H, W).
    """
    changed = images.copy()
    top, left = corner
    height, width = pattern.shape[1:]
    changed[:, :, top : top + height, left : left + width] = (pattern * 255).round().astype(np.uint8)
    return changed


def other_corner(corner: tuple[int, int], shape: tuple[int, int, int], size: int) -> tuple[int, int]:
    """Return the corner of the same patch on the image rotated by 180 degrees, where the owner never puts it."""
    top, left = shape[1] - size - corner[0], shape[2] - size - corner[1]
    return (top, left) if (top, left) != tuple(corner) else (0, 0)


def corner_of(key: Key) -> tuple[int, int]:
    """Return row and column of the first pixel of a key's patch."""
    top, left = key.settings["corner"]
    return int(top), int(left)


def check_patch(size: int, corner: tuple[int, int], shape: tuple[int, int, int]) -> None:
    """Refuse a patch that does not fit into the image.

    Raises:
        ConfigError: It does not.
    """
    if size < 1 or any(not 0 <= first <= side - size for first, side in zip(corner, shape[1:], strict=True)):
        raise ConfigError(
            f"a patch of {size} pixels at {list(corner)} does not fit into images of {shape[1]} x {shape[2]}; "
            "change size or corner"
        )


def check_label(name: str, label: int, train: ImageSet) -> None:
    """Refuse a class without training images.

    Raises:
        ConfigError: It has none.
    """
    if not 0 <= label < train.classes or not (train.labels == label).any():
        raise ConfigError(
            f"{name}: class {label} has no training image; choose one of {np.unique(train.labels).tolist()}"
        )


def patch_samples(
    key: Key, held_out: ImageSet, count: int, seed: int, *, pattern: Pattern, corner: tuple[int, int]
) -> WatermarkSamples:
    """Patch held-out images of the source class (of all classes but the target if it is -1); equal ones dropped.

    False positives are the same images under another pattern, and under this one in another place.

    Raises:
        DataError: There are no held-out images to patch, or they are of another shape.
    """
    source, target = key.source_classes[0], key.target_class
    if list(held_out.shape) != list(key.settings["shape"]):
        raise DataError(
            f"held-out images are {held_out.shape}, the key was made for {tuple(key.settings['shape'])}; "
            "verify with the data that the victim was trained on"
        )
    chosen = held_out.labels == source if source >= 0 else held_out.labels != target
    places = np.flatnonzero(chosen)
    if not len(places):
        raise DataError(
            f"no held-out image of class {source if source >= 0 else f'other than {target}'}; raise "
            "splits.verification_fraction"
        )
    places = numpy_generator(seed, "samples").permutation(places)[:count]
    images, size = held_out.images[places], pattern.shape[1]
    marked = stamped(images, pattern, corner)
    _, distinct = np.unique(marked.reshape(len(marked), -1), axis=0, return_index=True)
    distinct_at = np.sort(distinct)
    other = drawn_pattern(held_out.shape[0], size, key.seed + 1)
    if np.array_equal(other, pattern):
        other = 1 - other
    named = source >= 0
    return WatermarkSamples(
        images=marked[distinct_at],
        target=target,
        adverse={
            "other_pattern": stamped(images[distinct_at], other, corner),
            "other_place": stamped(images[distinct_at], pattern, other_corner(corner, held_out.shape, size)),
        },
        sources=images[distinct_at] if named else images[:0],
        source_labels=held_out.labels[places][distinct_at] if named else np.zeros(0, np.int64),
    )
