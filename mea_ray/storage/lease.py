"""A lease on a name in a shared folder: one process at a time holds it, and a killed holder loses it.

Works on a local disk and on NFS, because creating a file exclusively is atomic on both. Nothing depends on clocks
agreeing between machines: a waiter watches whether the holder's file still changes, by its own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from mea_ray.storage.files import patiently


def _machine() -> str:
    """Name where process numbers mean the same: a boot of a machine and, in it, one space of process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


class Lease:
    """Exclusive use of ``name`` among all processes that see ``folder``.

    The file of the holder is ``<name>.<generation>``. A waiter that saw no heartbeat for ``expiry_s`` takes over by
    creating the next generation, which only one of all waiters can; so no waiter ever removes a file it does not own.

    Args:
        folder: Folder of the lease files, made if missing.
        name: What is leased; letters, digits, ``.``, ``_`` and ``-``.
        beat_s: Seconds between two heartbeats of the holder.
        expiry_s: Seconds without a heartbeat after which the holder counts as dead; several ``beat_s``.
    """

    def __init__(self, folder: Path, name: str, *, beat_s: float = 3.0, expiry_s: float = 45.0) -> None:
        self.folder, self.name, self.beat_s, self.expiry_s = folder, name, beat_s, expiry_s
        self._path: Path | None = None
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None
        self._watched: tuple[str, str, float] | None = None

    def acquire(self, *, give_up: Callable[[], bool] = lambda: False, poll_s: float = 0.2) -> bool:
        """Wait for the lease.

        Args:
            give_up: Asked at every poll; waiting ends when it says True (what was wanted is there already).
            poll_s: Seconds between two looks.

        Returns:
            True when the lease is held, False when waiting was given up.
        """
        while not give_up():
            if self.try_acquire():
                return True
            time.sleep(poll_s)
        return False

    def try_acquire(self) -> bool:
        """Take the lease if it is free or its holder is dead; waits for nothing but a storage that is away."""
        return patiently(self._try, self.folder / self.name)

    def _try(self) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = self._newest()
        if newest is not None and not self._is_dead(self._file(newest)):
            return False
        path = self._file(0 if newest is None else newest + 1)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(self._identity(), file)
        self._path = path
        self._stop.clear()
        self._beat = threading.Thread(target=self._keep_alive, name=f"lease-{self.name}", daemon=True)
        self._beat.start()
        return True

    def release(self) -> None:
        """Give the lease back; nothing happens when it is not held."""
        path, self._path = self._path, None
        if path is None:
            return
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        # Oldest first: the newest file is what holds others off.
        for generation in range(self._generation(path) + 1):
            self._file(generation).unlink(missing_ok=True)

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @staticmethod
    def _identity() -> dict[str, object]:
        """Who holds it; the process's start time tells a reused process number from the holder."""
        started = psutil.Process().create_time()
        return {"machine": _machine(), "pid": os.getpid(), "started": started, "token": uuid.uuid4().hex}

    def _file(self, generation: int) -> Path:
        return self.folder / f"{self.name}.{generation}"

    @staticmethod
    def _generation(path: Path) -> int:
        return int(path.name.rpartition(".")[2])

    def _newest(self) -> int | None:
        pattern = re.compile(re.escape(self.name) + r"\.\d+")
        found = [self._generation(path) for path in self.folder.iterdir() if pattern.fullmatch(path.name)]
        return max(found, default=None)

    def _keep_alive(self) -> None:
        while not self._stop.wait(self.beat_s):
            if self._path is not None:
                with contextlib.suppress(OSError):
                    os.utime(self._path)

    def _is_dead(self, path: Path) -> bool:
        try:
            text, stamp = path.read_text(), str(path.stat().st_mtime_ns)
        except OSError:
            return False  # released between two looks; the next look finds it free
        if self._holder_is_gone(text):
            return True
        now = time.monotonic()
        if self._watched is None or self._watched[:2] != (path.name, stamp):
            self._watched = (path.name, stamp, now)
        return now - self._watched[2] > self.expiry_s

    @staticmethod
    def _holder_is_gone(text: str) -> bool:
        """On the holder's own machine its process can be looked up, which is faster than waiting for the expiry."""
        try:
            holder = json.loads(text)
            if holder["machine"] != _machine():
                return False
            return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1.0)
        except psutil.NoSuchProcess:
            return True
        except (ValueError, KeyError, psutil.Error):
            return False  # half-written, or not allowed to look: the heartbeat decides
