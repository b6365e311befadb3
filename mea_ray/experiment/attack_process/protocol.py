"""The protocol between an attack's process and its parent: JSON, and arrays as raw bytes. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from mea_ray.core import errors
from mea_ray.core.errors import AttackFailed, BadQuery, MeaRayError, QueryError

Tree = dict[str, Any]
LONGEST_HEADER = 64 * 2**20
"""Maximum size of a message's JSON, in bytes: an attack's curves are the longest."""
LONGEST_BLOCK = 2**31 - 1
"""Maximum size of an array or of a network's weights in a message, in bytes."""


class MessagePipe:
    """Messages over a connection: a JSON header and a block of bytes, which can be empty.

    Args:
        connection: Used for raw bytes only, never for pickles.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, header: Mapping[str, Any], block: bytes | memoryview = b"") -> None:
        """Send a message.

        Raises:
            OSError: The other side is gone.
        """
        self._connection.send_bytes(json.dumps(header).encode())
        self._connection.send_bytes(block)

    def receive(self) -> tuple[Tree, bytes]:
        """Wait for a message.

        Raises:
            EOFError: The other side is gone.
            OSError: The other side is gone, or the message is longer than allowed.
            ValueError: It is not a JSON object.
        """
        header = json.loads(self._connection.recv_bytes(LONGEST_HEADER))
        block = self._connection.recv_bytes(LONGEST_BLOCK)
        if not isinstance(header, dict):
            raise ValueError("a message must be a JSON object")
        return header, block

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def array_header(array: npt.NDArray[Any]) -> Tree:
    """Return the dtype and shape needed to read an array's bytes."""
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


def array_block(array: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of an array."""
    return np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")


def read_array(header: Mapping[str, Any], block: bytes, dtypes: tuple[str, ...], dimensions: int) -> npt.NDArray[Any]:
    """Return the array of a message, read-only.

    Args:
        header: Its ``dtype`` and ``shape``, as the sender gave them.
        block: Its bytes.
        dtypes: Allowed dtypes.
        dimensions: Required number of dimensions.

    Raises:
        BadQuery: The message does not describe such an array.
    """
    dtype, shape = header.get("dtype"), header.get("shape")
    if dtype not in dtypes:
        raise BadQuery(f"an array must be of {' or '.join(dtypes)}, got {str(dtype)[:40]!r}")
    if (
        not isinstance(shape, list)
        or len(shape) != dimensions
        or not all(type(side) is int and 0 <= side < 2**31 for side in shape)
    ):
        raise BadQuery(f"an array must have {dimensions} dimensions, got {str(shape)[:80]}")
    count = 1
    for side in shape:
        count *= side
    if count * np.dtype(dtype).itemsize != len(block):
        raise BadQuery(f"an array of {dtype} {shape} does not have {len(block)} bytes")
    return np.frombuffer(block, dtype).reshape(shape)


def error_header(error: BaseException) -> Tree:
    """Describe an error as JSON: one of mea_ray by name and arguments, any other by its text."""
    name = type(error).__name__
    if isinstance(error, MeaRayError) and getattr(errors, name, None) is type(error):
        try:
            json.dumps(error.args)
        except (TypeError, ValueError):
            return {"kind": name, "args": [str(error)]}
        return {"kind": name, "args": list(error.args)}
    return {"kind": "", "args": [f"{name}: {error}"]}


def read_error(header: Mapping[str, Any]) -> MeaRayError:
    """Return the error that a message describes; as an ``AttackFailed`` if it is not one of mea_ray."""
    kind, args = header.get("kind"), header.get("args")
    known = getattr(errors, kind, None) if isinstance(kind, str) else None
    given = args if isinstance(args, list) else []
    if isinstance(known, type) and issubclass(known, MeaRayError):
        try:
            error = known(*given)
            str(error)
            return error
        except Exception:
            return AttackFailed(f"{kind}: {given}"[:1000])
    return AttackFailed(str(given[0]) if given else "without a reason")


def refusal(error: BaseException) -> Tree:
    """Describe why a query failed: a refusal of the API in full, any other failure without its details."""
    if isinstance(error, QueryError):
        return error_header(error)
    return {"kind": "ServiceUnavailable", "args": ["the victim's service does not answer"]}
