"""Parses the body of a request into images: JPEG, PNG, ``.npy``, JSON and forms with several files.

All limits are checked before anything is decoded: bytes while the body arrives, pixels and shapes from the headers of
images and arrays. ``.npy`` files are read without pickle. Nothing here is charged.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from mea_ray.core.errors import DataError
from mea_ray.data.decode import Encoded, decode_one
from mea_ray.data.resize import fit
from mea_ray.service.http.problems import Refusal
from mea_ray.service.http.settings import HttpLimits

Array = npt.NDArray[Any]
JPEG, PNG, NPY, JSON, FORM = "image/jpeg", "image/png", "application/x-npy", "application/json", "multipart/form-data"
ACCEPTED = (JPEG, PNG, NPY, JSON, FORM)
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}
_NPY_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000
_READ_AT_ONCE = 2**20
"""Size below which parsing an array is faster than handing it to a thread, in bytes."""


@dataclass(frozen=True)
class Reader:
    """Reads bodies for one victim.

    Attributes:
        shape: (channels, height, width) of the victim's input.
        most_images: Maximum number of images in one request.
        limits: Limits of bytes and pixels.
    """

    shape: tuple[int, int, int]
    most_images: int
    limits: HttpLimits

    def limit_of(self, kind: str) -> int:
        """Return the largest body of a content type, in bytes."""
        limits = self.limits
        return min(limits.max_json_bytes, limits.max_request_bytes) if kind == JSON else limits.max_request_bytes

    async def receive(self, chunks: AsyncIterator[bytes], headers: Headers) -> bytes:
        """Return the whole body; reading stops at the limit.

        Raises:
            Refusal: 413, the body is too large; 415, its type is not accepted.
        """
        kind = content_type(headers)
        most = self.limit_of(kind)
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > most:
            raise _too_large(most)
        parts, size = [], 0
        async for chunk in chunks:
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            parts.append(chunk)
        return b"".join(parts)

    async def images(self, body: bytes, headers: Headers) -> Array:
        """Return the images of a body, (N, C, H, W); values and shape of arrays are checked by the service.

        Raises:
            Refusal: 400 or 422, the body has no images of the announced type; 413, an image is too large.
        """
        kind = content_type(headers)
        if kind == FORM:
            files = await self._files(body, headers)
            return await run_in_threadpool(lambda: self._joined(list(map(self._file, files))))
        if kind == NPY and len(body) <= _READ_AT_ONCE:
            return self._array(body)
        read = {JSON: self._json, NPY: self._array}.get(kind, self._picture)
        return await run_in_threadpool(read, body)

    async def _files(self, body: bytes, headers: Headers) -> list[bytes]:
        async def once() -> AsyncGenerator[bytes, None]:
            yield body

        try:
            form = await MultiPartParser(headers, once(), max_files=self.most_images, max_fields=0).parse()
        except (MultiPartException, KeyError, ValueError, UnicodeError) as error:
            reason = getattr(error, "message", "") or "it is damaged"
            raise Refusal(400, "form", f"the form cannot be read ({reason}); send each image as a file") from None
        try:
            uploads = [each for _, each in form.multi_items() if isinstance(each, UploadFile)]
            return [await each.read() for each in uploads]
        finally:
            await form.close()

    def _file(self, data: bytes) -> Array:
        return self._array(data) if data.startswith(_NPY_MAGIC) else self._picture(data)

    def _picture(self, data: bytes) -> Array:
        """Decode a JPEG or PNG and convert it to the victim's size and channels, like images of a dataset."""
        form = next((form for magic, form in _MAGIC.items() if data.startswith(magic)), None)
        if form is None:
            raise Refusal(400, "image", "the file is not a JPEG, PNG or .npy file; send one of these")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
                with Image.open(io.BytesIO(data), formats=[form]) as image:
                    width, height = image.size
        except Image.DecompressionBombError:
            raise self._too_many_pixels("more than a hundred million") from None
        except Exception:  # Pillow raises errors of many types for damaged headers
            raise Refusal(400, "image", f"the {form} is damaged; send a whole file") from None
        if width * height > self.limits.max_image_pixels:
            raise self._too_many_pixels(f"{width} x {height}")
        try:
            pixels, _ = decode_one(Encoded("the image", data), None)
            return fit(pixels[None].copy(), self.shape)  # torch warns about read-only arrays
        except DataError as error:
            raise Refusal(422, "image", str(error)) from None

    def _too_many_pixels(self, size: str) -> Refusal:
        return Refusal(
            413,
            "pixels",
            f"the image has {size} pixels, the limit is {self.limits.max_image_pixels}; resize it, the model's input "
            f"is {self.shape[1]} x {self.shape[2]}",
        )

    def _array(self, data: bytes) -> Array:
        """Read a ``.npy`` file without pickle: (N, C, H, W), or (C, H, W) for one image."""
        stream = io.BytesIO(data)
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream, max_header_size=_LONGEST_HEADER)
        except Exception:  # a damaged header raises ValueError, SyntaxError, struct.error, ...
            raise Refusal(400, "npy", "the .npy file cannot be read; write it with numpy.save") from None
        if dtype not in (np.dtype(np.uint8), np.dtype(np.float32)):
            raise Refusal(422, "npy", f"an array must be uint8 or float32, got {str(dtype)[:40]}; convert it")
        size = math.prod(shape) * dtype.itemsize
        rest = data[stream.tell() :]
        if any(side < 0 for side in shape) or size != len(rest):
            raise Refusal(400, "npy", f"the .npy file announces {size} bytes of values and has {len(rest)}")
        values = np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
        return np.ascontiguousarray(values[None] if values.ndim == 3 else values)

    def _json(self, body: bytes) -> Array:
        try:
            tree = json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, "json", "the body is not JSON; see /docs for examples") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("images"), list):
            raise Refusal(422, "json", 'the body must be an object with a list "images"; see /docs for examples')
        unknown = sorted(set(tree) - {"images", "dtype"})
        if unknown:
            raise Refusal(422, "json", f"unknown member {unknown[0][:40]!r}; known: images, dtype")
        dtype = tree.get("dtype", "uint8")
        if dtype not in ("uint8", "float32"):
            raise Refusal(422, "json", "dtype must be uint8 (values 0 to 255) or float32 (values 0 to 1)")
        items = tree["images"]
        if not items:
            raise Refusal(422, "json", '"images" is empty; send at least one image')
        if len(items) > self.most_images:
            raise Refusal(
                422, "images", f"a request can have at most {self.most_images} images, got {len(items)}; split it"
            )
        return self._joined([self._item(item, dtype) for item in items])

    def _item(self, item: Any, dtype: str) -> Array:
        if isinstance(item, str):
            try:
                return self._file(base64.b64decode(item, validate=True))
            except (binascii.Error, ValueError):
                raise Refusal(
                    400, "base64", "an image is not base64; encode the bytes of a JPEG, PNG or .npy"
                ) from None
        if not isinstance(item, list):
            raise Refusal(422, "json", "an image must be base64 text or nested lists [channel][row][column]")
        return self._nested(item, dtype)

    def _nested(self, item: list[Any], dtype: str) -> Array:
        """Turn nested lists into one image; the shape is checked first, since ragged lists would become objects."""
        if not _has_shape(item, self.shape):
            raise Refusal(
                422, "images", f"nested lists must have shape {list(self.shape)}: [channel][row][column] of numbers"
            )
        flat = [value for plane in item for row in plane for value in row]
        if not all(type(value) in (int, float) for value in flat):
            raise Refusal(422, "images", "nested lists must hold numbers only")
        if dtype == "uint8" and not all(type(value) is int and 0 <= value <= 255 for value in flat):
            raise Refusal(
                422, "images", 'uint8 values must be integers from 0 to 255; for 0 to 1 set "dtype": "float32"'
            )
        if dtype == "float32" and not all(0 <= value <= 1 for value in flat):
            raise Refusal(422, "images", "float32 values must lie in [0, 1]")
        return np.array(flat, dtype=dtype).reshape(1, *self.shape)

    def _joined(self, parts: Sequence[Array]) -> Array:
        if not parts:
            raise Refusal(422, "images", "the request has no image; send at least one")
        first = parts[0]
        for part in parts:
            if part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
                raise Refusal(
                    422,
                    "images",
                    f"the images differ: {first.dtype} {list(first.shape[1:])} and {part.dtype} "
                    f"{list(part.shape[1:])}; send images of one type and shape",
                )
        return first if len(parts) == 1 else np.concatenate(parts)


def content_type(headers: Headers) -> str:
    """Return the type of a body, without its parameters.

    Raises:
        Refusal: 415, it is not accepted.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ACCEPTED:
        label = kind[:60] or "none"
        raise Refusal(415, "type", f"Content-Type {label!r} is not accepted; send one of {', '.join(ACCEPTED)}")
    return kind


def _has_shape(item: list[Any], shape: tuple[int, ...]) -> bool:
    """Return whether nested lists have a shape; deeper levels are not checked."""
    if len(item) != shape[0]:
        return False
    return len(shape) == 1 or all(isinstance(each, list) and _has_shape(each, shape[1:]) for each in item)


def _too_large(most: int) -> Refusal:
    return Refusal(413, "bytes", f"the body is larger than the limit of {most} bytes; send fewer images")
