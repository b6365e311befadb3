"""Segments of a file that grows: each is named by the bytes of the file that it holds, ``<first>-<end>``."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"(\d{15})-(\d{15})")


def name(start: int, end: int) -> str:
    """Return the name of the segment with the bytes from ``start`` up to, and without, ``end``."""
    return f"{start:015d}-{end:015d}"


def missing(names: Iterable[str], here: int) -> list[tuple[int, str]]:
    """Return the segments that complete a file, as (first byte, name), in the order in which they are to be written.

    Args:
        names: All segments. Some may hold the same bytes, where a process was killed while it merged them.
        here: Bytes that are here already.
    """
    ranges = sorted((int(match[1]), int(match[2])) for each in names if (match := _NAME.fullmatch(each)))
    chosen: list[tuple[int, str]] = []
    while True:
        # Of those that begin at or before the end of what is here, the one that reaches furthest.
        start, end = max(((s, e) for s, e in ranges if s <= here < e), key=lambda each: each[1], default=(0, 0))
        if end <= here:
            return chosen
        chosen.append((start, name(start, end)))
        here = end
