"""Checks of a query API, made before anything is charged or logged."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import BadQuery

LONGEST_NAME = 128
"""Maximum length of a client's name or a request id, in characters."""
_NAME = re.compile(rf"[A-Za-z0-9_.:/+@=-]{{1,{LONGEST_NAME}}}", re.ASCII)


def check_images(images: Any, shape: tuple[int, int, int], max_images: int | None = None) -> None:
    """Reject images that a query API cannot answer.

    Args:
        images: The sent images: must be a numpy array, uint8 or float32 in [0, 1], (N, *shape), N >= 1.
        shape: (channels, height, width) of the victim's input.
        max_images: Largest N; None for no limit.

    Raises:
        BadQuery: The images are invalid. The message says what was sent and what is accepted.
    """
    if not isinstance(images, np.ndarray):
        raise BadQuery(f"images must be a numpy array, got {type(images).__name__}; convert them with numpy.asarray")
    if images.dtype not in (np.uint8, np.float32):
        raise BadQuery(f"images must be uint8 in 0..255 or float32 in [0, 1], got {images.dtype}; convert them")
    if images.ndim != 4 or images.shape[1:] != tuple(shape):
        expected = ", ".join(map(str, shape))
        raise BadQuery(f"images must have shape (N, {expected}), got {images.shape}; reshape or resize them")
    if len(images) == 0:
        raise BadQuery("a query must have at least 1 image, got 0")
    if max_images is not None and len(images) > max_images:
        raise BadQuery(
            f"a request can have at most {max_images} images, got {len(images)}; split it (`service.request_images`)"
        )
    if images.dtype == np.float32:
        low, high = float(images.min()), float(images.max())
        # NaN fails every comparison, so this line rejects NaN, infinities and values out of range.
        if not (low >= 0.0 and high <= 1.0):
            raise BadQuery(f"float32 images must lie in [0, 1] without NaN, got {low} to {high}; scale them")


def check_name(what: str, name: Any) -> None:
    """Reject a client's name or a request id that the ledger and the query log do not accept.

    Accepted are 1 to ``LONGEST_NAME`` ASCII letters, digits and ``_ . : / + @ = -``. Anything else could be stored
    under a different name, or fail in the middle of a transaction with other clients' requests.

    Args:
        what: Description of the name, for the message.
        name: The name that was sent.

    Raises:
        BadQuery: It is not a string of this form.
    """
    if not isinstance(name, str):
        raise BadQuery(f"{what} must be a string, got {type(name).__name__}")
    if not _NAME.fullmatch(name):
        shortened = repr(name[:40]) + ("..." if len(name) > 40 else "")
        raise BadQuery(
            f"{what} must have 1 to {LONGEST_NAME} letters, digits or any of _.:/+@=-, got {shortened} ({len(name)} "
            "characters)"
        )


def image_digest(images: npt.NDArray[np.generic]) -> str:
    """Return a hash of type, shape and content: 32 hexadecimal digits."""
    state = hashlib.sha256(f"{images.dtype}{images.shape}".encode())
    state.update(np.ascontiguousarray(images).data)
    return state.hexdigest()[:32]
