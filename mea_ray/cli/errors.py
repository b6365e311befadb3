"""Errors and warnings on the command line: one line for each, and the exit code of an error."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from mea_ray.cli.options import FAILED, USAGE
from mea_ray.core.errors import ArtifactError, ConfigError, DataError, MeaRayError, RenamedOption, first_line
from mea_ray.storage.files import is_of_arrow

REMEDIES = {
    errno.EACCES: "choose a place that you may use (storage=..., data.path=...), or change its permissions",
    errno.EPERM: "choose a place that you may use (storage=..., data.path=...), or change its permissions",
    errno.EROFS: "choose a place that can be written (storage=...)",
    errno.ENOSPC: "free some space, or choose another place (storage=...)",
    errno.EDQUOT: "free some space, or choose another place (storage=...)",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "give a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another place (storage=...)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ELOOP: "the path is a link that leads back to itself; remove it",
}
"""Maps an error number of the operating system to a remedy."""


@dataclass(frozen=True)
class Report:
    """An error as the user sees it.

    Attributes:
        title: Heading of the panel.
        text: One sentence: the value, the constraint, the remedy.
        code: The exit code.
        is_bug: The error is unexpected: a bug in mea_ray.
    """

    title: str
    text: str
    code: int
    is_bug: bool = False


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show a renamed option as one line on stderr, once per process; other warnings as Python does."""
    seen: set[str] = set()
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, RenamedOption):
            usual(message, category, filename, lineno, file, line)
        elif str(message) not in seen:
            from mea_ray.report.terminal import note

            seen.add(str(message))
            note(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", RenamedOption)
        warnings.showwarning = show
        yield


def report(error: BaseException) -> Report:
    """Return the user's view of an error that ended a command."""
    name = type(error).__name__
    if isinstance(error, MeaRayError):
        code = USAGE if isinstance(error, (ConfigError, DataError, ArtifactError)) else FAILED
        return Report(name, str(error) or name, code)
    if isinstance(error, OSError):
        return Report(name, _of_the_system(error), USAGE)
    if isinstance(error, UnicodeError):
        return Report(name, f"a file or an argument is not UTF-8 text ({first_line(error)}); save it as UTF-8", USAGE)
    if isinstance(error, RecursionError):
        return Report(name, "a file or a setting is nested too deeply; reduce its nesting", USAGE)
    if isinstance(error, OverflowError):
        return Report(name, f"a number is too large ({first_line(error)}); choose a smaller one", USAGE)
    if isinstance(error, MemoryError):
        text = "there is not enough memory for this; take fewer or smaller images, or a smaller batch"
        return Report(name, f"{text} ({first_line(error)})" if str(error) else text, USAGE)
    if is_of_arrow(error):
        return Report(name, f"{first_line(error)}; check storage and data, and your credentials for them", USAGE)
    if type(error).__module__.split(".")[0] == "ray":
        return Report(name, f"Ray failed: {first_line(error)}; --debug shows everything", FAILED)
    text = f"this is a bug in mea_ray: {name}: {first_line(error)}; please report it with the output of --debug"
    return Report("Bug", text, FAILED, is_bug=True)


def cause(error: BaseException) -> BaseException:
    """Return the error that an actor raised: Ray wraps it in its own error."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error


def _of_the_system(error: OSError) -> str:
    """Return the file, the operating system's message, and a remedy."""
    reason = error.strerror or first_line(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename is not None else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where}{reason}; {remedy}" if remedy else f"{where}{reason}"
