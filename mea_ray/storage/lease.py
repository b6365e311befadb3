"""A lease on a name: one process at a time has it, and a killed holder loses it.

Clocks need not be synchronised or run evenly. A waiter checks by its own monotonic clock whether the holder's heartbeat
still changes. A holder that was paused for too long loses the lease: it must call `ensure` right before it makes
anything visible.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from mea_ray.core.errors import LeaseLost
from mea_ray.storage import process
from mea_ray.storage.files import patiently

_LONGEST_LOOK_S = 1.0
"""Most that one look adds to a silence: a waiter that was paused itself must not take that for the holder's silence."""


class Lease(ABC):
    """Exclusive use of a name; what differs between storages is how a claim is made and seen.

    Args:
        name: What is leased; letters, digits, ``.``, ``_`` and ``-``.
        beat_s: Seconds between two heartbeats of the holder.
        expiry_s: Seconds without a heartbeat after which the holder counts as dead; several ``beat_s``.
        on_lost: Called once, in the thread of the heartbeat, when another process has taken the lease over.
    """

    def __init__(
        self, name: str, *, beat_s: float, expiry_s: float, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        self.name, self.beat_s, self.expiry_s, self.on_lost = name, beat_s, expiry_s, on_lost
        self.token = ""
        """Changes with every acquisition; empty while the lease is not held."""
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self.saw_heartbeat = False
        """Whether the present holder was seen alive since `try_acquire` was first called."""
        self._watched = ("", "")
        self._silent_s, self._looked = 0.0, 0.0

    def acquire(self, *, give_up: Callable[[], bool] = lambda: False, poll_s: float = 0.2) -> bool:
        """Wait for the lease.

        Args:
            give_up: Called at every poll; waiting ends when it returns True (the result already exists).
            poll_s: Polling interval, in seconds.

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
        token = uuid.uuid4().hex
        if not self._claim(token):
            return False
        self.token = token
        self._stop.clear()
        self._heart = threading.Thread(target=self._beat_until_stopped, name=f"lease-{self.name}", daemon=True)
        self._heart.start()
        return True

    def release(self) -> None:
        """Release the lease; does nothing if it is not held."""
        token, self.token = self.token, ""
        if not token:
            return
        self._stop.set()
        if self._heart is not None and self._heart is not threading.current_thread():
            self._heart.join()
        self._withdraw(token)

    def is_held(self) -> bool:
        """Look whether this process still holds the lease."""
        return bool(self.token) and self._is_mine(self.token)

    def ensure(self) -> None:
        """Check the lease, right before something is made visible that only its holder may make.

        Raises:
            LeaseLost: It was taken over, for this process was silent for too long.
        """
        if not self.is_held():
            raise LeaseLost(
                f"the lease on {self.name} was taken over by another process, since this one was silent for more than "
                f"{self.expiry_s:g} s"
            )

    @abstractmethod
    def holder(self) -> dict[str, Any] | None:
        """Return how the present holder described itself, see `process.identity`; None if there is none."""

    @abstractmethod
    def _claim(self, token: str) -> bool:
        """Try to become the holder, under a token of its own."""

    @abstractmethod
    def _is_mine(self, token: str) -> bool:
        """Whether the holder is the one with this token."""

    @abstractmethod
    def _beat(self, token: str) -> None:
        """Change what waiters watch."""

    @abstractmethod
    def _withdraw(self, token: str) -> None:
        """Remove the claim with this token, and no other."""

    def _is_silent(self, who: str, beat: str) -> bool:
        """Watch a holder by what changes with its heartbeat; call it at every look."""
        now = time.monotonic()
        if (who, beat) != self._watched:
            self.saw_heartbeat = self._watched[0] == who
            self._watched, self._silent_s = (who, beat), 0.0
        else:
            self._silent_s += min(now - self._looked, max(_LONGEST_LOOK_S, self.beat_s))
        self._looked = now
        return self._silent_s > self.expiry_s

    def _beat_until_stopped(self) -> None:
        while not self._stop.wait(self.beat_s):
            token = self.token
            with contextlib.suppress(OSError):  # a storage that is away: nobody else can see it either
                if token and self._has_lost_it(token):
                    self.on_lost()
                    return
                self._beat(token)

    def _has_lost_it(self, token: str) -> bool:
        """Whether the lease with this token was taken over, which a storage that is away does not mean."""
        return not self._is_mine(token)

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class FileLease(Lease):
    """A lease in a folder that all processes see. Creating a file exclusively is atomic on a local disk and on NFS.

    The file of the holder is ``<name>.<generation>``. A waiter takes over by creating the next generation, which only
    one of all waiters can.

    Args:
        folder: Folder of the lease files, made if missing.
        name: See `Lease`.
        beat_s: See `Lease`.
        expiry_s: See `Lease`.
        on_lost: See `Lease`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        beat_s: float = 3.0,
        expiry_s: float = 45.0,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name, beat_s=beat_s, expiry_s=expiry_s, on_lost=on_lost)
        self.folder = folder
        self._generation = -1

    def holder(self) -> dict[str, Any] | None:
        """See `Lease.holder`."""
        newest = self._newest()
        return None if newest is None else _read(self._file(newest))

    def _claim(self, token: str) -> bool:
        return patiently(lambda: self._try(token), self.folder / self.name)

    def _try(self, token: str) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = self._newest()
        if newest is not None and not self._is_dead(self._file(newest)):
            return False
        generation = 0 if newest is None else newest + 1
        try:
            with self._file(generation).open("x", encoding="utf-8") as file:
                json.dump({**process.identity(), "token": token}, file)
        except FileExistsError:
            return False
        self._generation = generation
        return True

    def _is_mine(self, token: str) -> bool:
        newest = self._newest()
        return newest == self._generation and (_read(self._file(newest)) or {}).get("token") == token

    def _has_lost_it(self, token: str) -> bool:
        holder = self.holder()  # none where the folder is away: a disk does not say so, as an object store does
        return holder is not None and holder.get("token") != token

    def _beat(self, token: str) -> None:
        os.utime(self._file(self._generation))

    def _withdraw(self, token: str) -> None:
        # Oldest first: the newest file is what holds others off.
        for generation in range(self._generation):
            self._file(generation).unlink(missing_ok=True)
        # Moved and looked at before it is removed: in the meantime the name may have come to belong to another process.
        own, aside = self._file(self._generation), self.folder / f".{self.name}.{token}"
        with contextlib.suppress(FileNotFoundError):
            own.rename(aside)
            if (_read(aside) or {}).get("token") != token:
                with contextlib.suppress(OSError):
                    os.link(aside, own)  # fails if there is another one by now
            aside.unlink(missing_ok=True)

    def _file(self, generation: int) -> Path:
        return self.folder / f"{self.name}.{generation}"

    def _newest(self) -> int | None:
        pattern = re.compile(re.escape(self.name) + r"\.(\d+)")
        try:
            numbers = [int(match[1]) for path in self.folder.iterdir() if (match := pattern.fullmatch(path.name))]
        except FileNotFoundError:
            return None
        return max(numbers, default=None)

    def _is_dead(self, path: Path) -> bool:
        holder = _read(path)
        try:
            stamp = str(path.stat().st_mtime_ns)
        except OSError:
            return False  # released between two looks; the next look finds it free
        if holder is not None and process.is_gone(holder):
            return True  # faster than to wait for its silence
        return self._is_silent(path.name, stamp)


def _read(path: Path) -> dict[str, Any] | None:
    """Read how a holder describes itself; None if there is none."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None
