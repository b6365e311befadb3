"""Decode encoded images into one uint8 array: the only place where files become pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, UnidentifiedImageError

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, Images, ImageSet, Labels
from mea_ray.data.resize import fit

_CHUNK = 256
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La"})


@dataclass(frozen=True)
class Encoded:
    """An image that is still encoded.

    Attributes:
        name: Where it came from, for messages.
        data: The encoded bytes, or the file that holds them.
        box: (left, top, right, bottom) in pixels to cut out first; the whole image when None.
    """

    name: str
    data: bytes | Path
    box: tuple[int, int, int, int] | None = None


def check_image_size(image_size: int | None) -> None:
    """Refuse an ``image_size`` below 1.

    Raises:
        ConfigError: It is not positive.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"data.image_size={image_size} must be at least 1 pixel; networks take 8 or more")


def check_fraction(name: str, fraction: float | None) -> None:
    """Refuse a fraction outside (0, 1).

    Raises:
        ConfigError: It lies outside.
    """
    if fraction is not None and not 0 < fraction < 1:
        raise ConfigError(f"data.{name}={fraction} must lie between 0 and 1, both excluded")


def decode(items: Iterable[Encoded], count: int, image_size: int | None) -> Images:
    """Decode images, several at a time, holding only a few encoded ones at once.

    Args:
        items: ``count`` encoded images.
        count: How many there are.
        image_size: Shorter sides are resized to it (bilinear, antialiased) and the middle square is cut out. None
            keeps the size, which must then be the same for all.

    Returns:
        uint8, shape (count, 1, H, W) when all images are grey, else (count, 3, H, W).

    Raises:
        DataError: An image is damaged, has 16-bit or float pixels, or another size than the first; or the decoded
            images would not fit into memory.
    """
    iterator = iter(items)
    out: Images | None = None
    done, grey = 0, True
    with ThreadPoolExecutor(_threads()) as pool:
        while chunk := list(islice(iterator, _CHUNK * _threads())):
            parts = [chunk[start : start + _CHUNK] for start in range(0, len(chunk), _CHUNK)]
            for part, results in zip(parts, pool.map(_decode_part, parts, [image_size] * len(parts)), strict=True):
                for item, (pixels, is_grey) in zip(part, results, strict=True):
                    if out is None:
                        out = _allocate(count, pixels.shape)
                    if pixels.shape != out.shape[1:]:
                        raise DataError(
                            f"{item.name} is {pixels.shape[2]} x {pixels.shape[1]} pixels, images before it are "
                            f"{out.shape[3]} x {out.shape[2]}; set data.image_size to resize all to one size"
                        )
                    out[done] = pixels
                    grey &= is_grey
                    done += 1
    if out is None:
        raise DataError("there are no images to decode")
    return np.ascontiguousarray(out[:done, :1]) if grey else out[:done]


def assemble(
    name: str, train: Images, train_labels: Labels, test: Images, test_labels: Labels, class_names: tuple[str, ...]
) -> Dataset:
    """Make a dataset of decoded parts; a grey part beside a colour part becomes colour.

    Raises:
        DataError: The parts differ in image size.
    """
    if train.shape[2:] != test.shape[2:]:
        raise DataError(
            f"train images are {train.shape[3]} x {train.shape[2]} pixels, test images {test.shape[3]} x "
            f"{test.shape[2]}; set data.image_size to resize all to one size"
        )
    channels = max(train.shape[1], test.shape[1])
    shape = (channels, train.shape[2], train.shape[3])
    return Dataset(
        name,
        ImageSet(fit(train, shape), train_labels, class_names),
        ImageSet(fit(test, shape), test_labels, class_names),
    )


def _threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, available))


def _allocate(count: int, shape: tuple[int, ...]) -> Images:
    needed, free = count * int(np.prod(shape)), psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{count} images of {shape[2]} x {shape[1]} pixels need {needed / 2**30:.1f} GiB in memory, "
            f"{free / 2**30:.1f} GiB are free; set a smaller data.image_size or load fewer images"
        )
    return np.empty((count, *shape), np.uint8)


def _decode_part(items: list[Encoded], image_size: int | None) -> list[tuple[Images, bool]]:
    return [_decode_one(item, image_size) for item in items]


def _decode_one(item: Encoded, image_size: int | None) -> tuple[Images, bool]:
    try:
        with Image.open(io.BytesIO(item.data) if isinstance(item.data, bytes) else item.data) as image:
            if image.mode not in _GREY_MODES | _COLOUR_MODES:
                raise DataError(f"{item.name} has pixels of mode {image.mode!r}; convert it to 8 bits per channel")
            if image_size is not None and item.box is None:
                # JPEG can leave out the detail that the resizing would average away.
                image.draft(None, (2 * image_size, 2 * image_size))
            grey = image.mode in _GREY_MODES
            pixels = image if image.mode == "RGB" else image.convert("RGB")
            pixels = _crop(pixels, item) if item.box is not None else pixels
            pixels = _square(pixels, image_size) if image_size is not None else pixels
            return np.asarray(pixels, np.uint8).transpose(2, 0, 1), grey
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode {item.name}: {error}; replace or remove the image") from None


def _crop(image: Image.Image, item: Encoded) -> Image.Image:
    assert item.box is not None
    left, top, right, bottom = item.box
    box = (max(0, left), max(0, top), min(image.width, right), min(image.height, bottom))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise DataError(
            f"{item.name}: box {item.box} (left, top, right, bottom) holds nothing of an image of {image.width} x "
            f"{image.height} pixels; correct the box"
        )
    return image.crop(box)


def _square(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
