"""Reads text files in any common encoding."""

from __future__ import annotations

import codecs
from pathlib import Path

from mea_ray.core.errors import DataError

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MAX_BYTES = 2**28


def read_text(path: Path) -> str:
    """Read a text file, with or without a byte order mark, in UTF-8, UTF-16, UTF-32, Windows-1252 or Latin-1.

    Raises:
        DataError: It cannot be read, is above 256 MiB, or is not text.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(
                f"{path} has {size:,} bytes, a table may have at most {MAX_BYTES:,}; check that it is the table"
            )
        data = path.read_bytes()
        return data.decode(_encoding(data))
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read {path} as text: {error}; save it as UTF-8") from None


def _encoding(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    even, odd = data[:1024:2].count(0), data[1:1024:2].count(0)
    if max(even, odd) > len(data[:1024]) / 6:  # in UTF-16 every second byte of Latin letters is zero
        return "utf-16-le" if odd > even else "utf-16-be"
    for encoding in ("utf-8", "cp1252"):
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding
    return "latin-1"
