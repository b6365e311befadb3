"""Decode encoded images into one uint8 array: the only place where files become pixels.

Only the formats in ``FORMATS`` are opened, whatever the suffix. Others (EPS, WMF, PDF, ...) would run external
programs or rarely tested code. An image of more than ``MAX_PIXELS`` is refused before it is decoded, and so are images
that do not fit into memory together. Images are decoded as viewers display them:

- turned as its EXIF or XMP orientation says; boxes refer to the turned image;
- transparent pixels are put on white;
- palettes, CMYK and other colour spaces become RGB; pixels of 16 bits or floats are refused;
- of an animation or a file of several pages, the first frame.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mea_ray.core.errors import DataError
from mea_ray.core.mapped import is_mapped
from mea_ray.core.types import Images
from mea_ray.data.files import is_lfs_pointer
from mea_ray.data.memory import allocate, check_memory

_SUFFIXES_OF = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
    "PCX": (".pcx",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
Image.init()
FORMATS = tuple(name for name in _SUFFIXES_OF if name in Image.OPEN)
"""Formats that are opened, as Pillow names them: raster images that its own libraries decode."""
SUFFIXES = frozenset(suffix for name in FORMATS for suffix in _SUFFIXES_OF[name])
"""Suffixes of files of these formats, in lower case."""
MAX_PIXELS = 2**26
"""Largest image that is decoded: 67 million pixels, e.g. 8192 x 8192."""

_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La"})
_GROUND = (255, 255, 255, 255)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image of each EXIF orientation upright."""

_PART_IMAGES = 256
_PART_BYTES = 2**24
_SMALL_PIXELS = 2**18
_BYTES_PER_PIXEL = 12
"""Memory while an image is decoded: as it is stored, with transparency, and in RGB, at 4 bytes each."""


@dataclass(frozen=True)
class Encoded:
    """An encoded image.

    Attributes:
        name: Its origin, for messages.
        data: The encoded bytes, or the file that holds them.
        box: (left, top, right, bottom) in pixels to cut out first; the whole image when None.
    """

    name: str
    data: bytes | Path
    box: tuple[int, int, int, int] | None = None


def decode(
    items: Iterable[Encoded],
    count: int,
    image_size: int | None,
    *,
    room: Callable[[int, tuple[int, ...]], Images] = allocate,
) -> Images:
    """Decode images, several at a time. Besides the result, only a few of them are in memory at once.

    Args:
        items: ``count`` encoded images.
        count: Number of images.
        image_size: Shorter sides are resized to it (bilinear, antialiased) and the middle square is cut out. None
            keeps the size, which must then be the same for all.
        room: Allocates the uint8 result, given the number of images and the shape of one.

    Returns:
        uint8, shape (count, 1, H, W) when all images are grey, else (count, 3, H, W).

    Raises:
        DataError: An image is damaged, of another format, too large, has 16-bit or float pixels, or another size than
            the first; or the decoded images would not fit into memory.
    """
    iterator = iter(items)
    first = next(iterator, None)
    if first is None:
        raise DataError("there are no images to decode")
    pixels, grey = decode_one(first, image_size)
    out = room(count, pixels.shape)
    _place(out, 0, first, pixels)
    done = 1
    with ThreadPoolExecutor(_threads()) as pool:
        parts = _parts(iterator)
        while chunk := list(islice(parts, _threads())):
            starts = np.cumsum([done, *map(len, chunk)]).tolist()
            for part_grey in pool.map(lambda start, part: _decode_part(out, start, part, image_size), starts, chunk):
                grey &= part_grey
            done = starts[-1]
    if not grey:
        return out[:done]
    return out[:done, :1] if is_mapped(out) else np.ascontiguousarray(out[:done, :1])


def decode_one(item: Encoded, image_size: int | None) -> tuple[Images, bool]:
    """Decode one image.

    Args:
        item: The image.
        image_size: See ``decode``.

    Returns:
        uint8, shape (3, H, W), and whether it is grey.

    Raises:
        DataError: See ``decode``.
    """
    try:
        with Image.open(io.BytesIO(item.data) if isinstance(item.data, bytes) else item.data, formats=FORMATS) as image:
            if image.mode not in _GREY_MODES | _COLOUR_MODES:
                raise DataError(f"{item.name} has pixels of mode {image.mode!r}; convert it to 8 bits per channel")
            if image_size is not None and item.box is None:
                # JPEG can leave out the detail that the resizing would average away.
                image.draft(None, (2 * image_size, 2 * image_size))
            with _room_for(item, image.size):
                grey = image.mode in _GREY_MODES
                pixels = _opaque(_upright(image))
                pixels = _crop(pixels, item) if item.box is not None else pixels
                pixels = _square(pixels, item, image_size) if image_size is not None else pixels
                return np.asarray(pixels, np.uint8).transpose(2, 0, 1), grey
    except DataError:
        raise
    except UnidentifiedImageError:
        if isinstance(item.data, Path) and is_lfs_pointer(item.data):
            raise DataError(f"{item.name} is a pointer of Git LFS; run `git lfs pull` to download the images") from None
        raise DataError(
            f"cannot decode {item.name}: it is of none of the formats {', '.join(FORMATS)}; convert or remove the image"
        ) from None
    except Exception as error:  # a decoder may fail in any way on bytes that are not an image
        raise DataError(
            f"cannot decode {item.name}: {str(error) or type(error).__name__}; replace or remove the image"
        ) from None


def _threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, available))


def _parts(items: Iterator[Encoded]) -> Iterator[list[Encoded]]:
    """Divide encoded images into parts for the threads, each small in number and in bytes."""
    part: list[Encoded] = []
    size = 0
    for item in items:
        part.append(item)
        size += len(item.data) if isinstance(item.data, bytes) else 0
        if len(part) == _PART_IMAGES or size >= _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _decode_part(out: Images, start: int, items: list[Encoded], image_size: int | None) -> bool:
    """Decode images into ``out`` from ``start`` on; return whether all are grey."""
    all_grey = True
    for place, item in enumerate(items, start):
        pixels, grey = decode_one(item, image_size)
        _place(out, place, item, pixels)
        all_grey &= grey
    return all_grey


def _place(out: Images, place: int, item: Encoded, pixels: Images) -> None:
    if pixels.shape != out.shape[1:]:
        raise DataError(
            f"{item.name} is {pixels.shape[2]} x {pixels.shape[1]} pixels, images before it are {out.shape[3]} x "
            f"{out.shape[2]}; set data.image_size to resize all to one size"
        )
    if place >= len(out):
        raise DataError(f"{item.name} is one image more than the {len(out):,} that were expected")
    out[place] = pixels


class _Gate:
    """Limits the pixels that are decoded at once to ``limit`` in total: an image waits until there is room for it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.changed = threading.Condition()

    @contextmanager
    def passing(self, pixels: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + pixels <= self.limit)
            self.used += pixels
        try:
            yield
        finally:
            with self.changed:
                self.used -= pixels
                self.changed.notify_all()


_GATE = _Gate(MAX_PIXELS)


@contextmanager
def _room_for(item: Encoded, size: tuple[int, int]) -> Iterator[None]:
    """Refuse an image that is too large; let a large one wait for its turn."""
    pixels = size[0] * size[1]
    _check_pixels(item, "has", size)
    if pixels <= _SMALL_PIXELS:
        yield
        return
    with _GATE.passing(pixels):
        check_memory(f"the pixels of {item.name}", pixels * _BYTES_PER_PIXEL, "shrink the image")
        yield


def _check_pixels(item: Encoded, verb: str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(
            f"{item.name} {verb} {size[0]:,} x {size[1]:,} pixels, at most {MAX_PIXELS:,} are decoded; shrink or cut "
            "the image, or remove it"
        )


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata; the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def _opaque(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparent pixels on white."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, _GROUND)
        ground.alpha_composite(layer)
        image = ground
    return image if image.mode == "RGB" else image.convert("RGB")


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


def _square(image: Image.Image, item: Encoded, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    _check_pixels(item, "resized has", (width, height))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
