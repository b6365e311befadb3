"""Identifies processes across machines, for records in files."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

import psutil

_ENDED = {"Z", "X"}
"""States, in Linux's letters, of a process that has ended: a zombie, and one that is being removed."""


@cache
def machine() -> str:
    """Name where process numbers mean the same: a boot of a machine and, in it, one space of process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def started(pid: int) -> int | None:
    """Return when a process of this machine was started, in a unit of the system's; None if there is no such process.

    One that has ended, and that its parent has not waited for yet, is none either.

    On Linux these are clock ticks since the machine was booted. They distinguish a process from a later one with its
    number, and no change of the clock alters them.
    """
    try:
        # The second field is the command in parentheses, which may hold anything; the start is the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in _ENDED else int(fields[19])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, IndexError):
        return None
    if Path("/proc/self/stat").exists():
        return None
    try:
        entry = psutil.Process(pid)
        return None if entry.status() == psutil.STATUS_ZOMBIE else int(entry.create_time())
    except psutil.Error:
        return None


def identity() -> dict[str, Any]:
    """Describe this process in plain JSON."""
    pid = os.getpid()
    return {"machine": machine(), "pid": pid, "started": started(pid)}


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether a process with this description has certainly ended; False if it runs on another machine."""
    try:
        return bool(holder["machine"] == machine() and started(int(holder["pid"])) != holder["started"])
    except (KeyError, TypeError, ValueError):
        return False


def runs_here(holder: dict[str, Any]) -> bool:
    """Whether a process with this description runs on this machine."""
    return holder.get("machine") == machine() and not is_gone(holder)


def describe(holder: dict[str, Any]) -> str:
    """Name a process for a message."""
    host = str(holder.get("machine", "?")).partition("/")[0]
    return f"process {holder.get('pid', '?')} on {host}"
