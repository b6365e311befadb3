"""Checks for regular files: reading a pipe without a writer, or a device, would never end."""

from __future__ import annotations

import os
import stat


def check_regular(path: str | os.PathLike[str]) -> None:
    """Reject everything except files and folders.

    Raises:
        OSError: There is nothing, or a pipe, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("it is a pipe, a socket or a device, not a file")
