"""Atomically written files, and waiting for a full disk or an unavailable storage.

A process that works on a shared storage calls ``PATIENCE.begin``; its writes then wait, with back-off, for space or for
the storage, and report that once. Otherwise every error is raised immediately.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mea_ray.core.errors import ConfigError, StorageUnavailable
from mea_ray.core.regular import check_regular

T = TypeVar("T")
FULL = {errno.ENOSPC, errno.EDQUOT}
AWAY = {
    *(errno.EIO, errno.ESTALE, errno.EROFS, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNREFUSED, errno.EREMOTEIO),
}
"""Temporary errors: of a full disk, and of a network file system or a disk that is currently unavailable."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class Patience:
    """How long this process waits for its storage, and how it reports that.

    Attributes:
        seconds: Maximum wait in seconds; 0 raises immediately.
        marker: A file that exists as long as the storage is available; None without one. An unmounted storage looks
            like an empty folder: without the marker a process would start again in it.
        there: Whether a remote storage is there, asked after an error only; None for a storage with a marker. A remote
            storage that is away says so itself, by an error.
        notify: Called with a message when a wait begins and when it ends.
    """

    def __init__(self) -> None:
        self.seconds: float = 0.0
        self.marker: Path | None = None
        self.there: Callable[[], bool] | None = None
        self.name = ""
        self.notify: Callable[[str], None] = lambda text: None

    def begin(
        self,
        seconds: float,
        marker: Path | None,
        notify: Callable[[str], None],
        *,
        there: Callable[[], bool] | None = None,
        name: str = "",
    ) -> None:
        """Be patient from now on; ``name`` is what messages call a storage without a marker."""
        self.seconds, self.marker, self.notify, self.there, self.name = seconds, marker, notify, there, name

    @contextlib.contextmanager
    def during(
        self, seconds: float, marker: Path | None, notify: Callable[[str], None], **remote: Any
    ) -> Iterator[None]:
        """Be patient in a ``with`` block; the arguments are those of `begin`."""
        seconds_before, marker_before, notify_before = self.seconds, self.marker, self.notify
        remote_before: dict[str, Any] = {"there": self.there, "name": self.name}
        self.begin(seconds, marker, notify, **remote)
        try:
            yield
        finally:
            self.begin(seconds_before, marker_before, notify_before, **remote_before)

    @property
    def away(self) -> bool:
        """Whether the storage is not there, as far as this machine can tell without asking a remote one."""
        return self.marker is not None and not self.marker.exists()

    def place(self, path: Path) -> str:
        """Return what a message names: the storage's folder or URI, or the file's own folder where neither is known."""
        return self.name or str(self.marker.parent if self.marker is not None else path.parent)

    def notify_waiting(self, path: Path, why: str) -> None:
        """Report that a wait begins, in the same words from every process, so that one warning can stand for all."""
        self.notify(f"storage {self.place(path)} is {why}; waiting for it up to {self.seconds:g} s")

    def notify_back(self, path: Path) -> None:
        """Report that the wait is over."""
        self.notify(f"storage {self.place(path)} takes files again; going on")

    def why(self, error: OSError | StorageUnavailable) -> str | None:
        """Return what a wait would be for: ``full`` or ``away``; None for an error that will not pass."""
        if isinstance(error, StorageUnavailable):
            return error.why
        if error.errno in FULL:
            return "full"
        # A remote file system's own errors have no number.
        if error.errno is None or error.errno in AWAY or self.away:
            return "away"
        return "away" if self.there is not None and not self._is_there() else None

    def _is_there(self) -> bool:
        try:
            return self.there is None or self.there()
        except OSError:
            return False


PATIENCE = Patience()
"""That of this process."""


def patiently(work: Callable[[], T], path: Path) -> T:
    """Do something with files; wait and do it again while their storage is full or away.

    Args:
        work: What can be done again from its start.
        path: What the message names, if the storage has no marker.

    Raises:
        StorageUnavailable: The storage did not come back in time.
        OSError: Another error, or any error in a process that does not wait.
    """
    place = PATIENCE.place(path)
    began: float | None = None
    pause = _FIRST_PAUSE_S
    while True:
        try:
            if PATIENCE.away:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place)
            result = work()
        except (OSError, StorageUnavailable) as error:
            why = PATIENCE.why(error)
            if why is None or not PATIENCE.seconds:
                raise
            now = time.monotonic()
            if began is None:
                began = now
                PATIENCE.notify_waiting(path, why)
            if now - began >= PATIENCE.seconds:
                raise StorageUnavailable(place, why, now - began, str(error)) from error
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_S, 2 * pause)
        else:
            if began is not None:
                PATIENCE.notify_back(path)
            return result


@contextlib.contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of the file system into one line, for files that are written before any work has begun.

    Args:
        what: What is written or read, e.g. ``storage=/data cannot be written``.
        remedy: What to do about it.

    Raises:
        ConfigError: The block met an error of the operating system, or a name that is not UTF-8.
    """
    try:
        yield
    except OSError as error:  # a remote file system's errors have a text and no number
        raise ConfigError(f"{what}: {error.strerror or ' '.join(str(error).split())}; {remedy}") from error
    except UnicodeError:
        raise ConfigError(f"{what}: its name is not UTF-8; {remedy}") from None
    except Exception as error:
        if not is_of_arrow(error):
            raise
        raise ConfigError(f"{what}: {' '.join(str(error).split())}; {remedy}") from error


def is_of_arrow(error: BaseException) -> bool:
    """Whether an error is one of pyarrow's own, not the system's, such as those of Azure's client."""
    return type(error).__module__.partition(".")[0] == "pyarrow"


def at_home(path: str | Path, setting: str) -> Path:
    """Return a path with ``~`` and ``~user`` expanded.

    Args:
        path: The path.
        setting: The setting that holds it, for the message.

    Raises:
        ConfigError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = str(path).partition("/")[0]
        raise ConfigError(f"{setting}={path}: {user} has no home folder on this machine; give the whole path") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits.

    Raises:
        OSError: It cannot be read, or is a pipe or a device.
    """
    check_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_at_most(path: Path, size: int) -> bytes:
    """Read a file that somebody named, of which nothing is known: it may be a device without an end.

    Raises:
        OSError: It cannot be read, or has more than ``size`` bytes.
        ValueError: The path holds a null character.
    """
    with path.open("rb") as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise OSError(errno.EFBIG, f"it has more than {size:,} bytes", str(path))
    return data


def try_writing(folder: Path) -> None:
    """Write a small file into a folder and remove it again, with every folder that was made for it.

    For what is written after hours of work: that it cannot be is known before.

    Raises:
        OSError: It cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        write_whole(probe, "probe")
        probe.unlink()
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # not made, or another process uses it by now
                each.rmdir()


def write_whole(path: Path, content: bytes | str, *, mode: int | None = None) -> None:
    """Write a file atomically: write a temporary file, flush it to disk, rename it.

    Waits for a full or unavailable storage, see ``patiently``.

    Args:
        path: The file; its folder is created.
        content: Text is written as UTF-8.
        mode: Permissions, from the first byte on, whatever the umask; None takes the usual ones.
    """
    data = content.encode() if isinstance(content, str) else content

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
        try:
            if mode is not None:
                aside.touch(mode=mode)
                aside.chmod(mode)
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)  # a write, unlike an open, does not say what it wrote to
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise

    patiently(write, path)
