"""Finds the files of a folder: one walk for every loader.

Hidden files and folders are left out at any depth, and so are the files that desktops, archives and network disks
leave behind.
Symbolic links are followed. Broken links, and links to a folder above them, are left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mea_ray.core.errors import DataError
from mea_ray.core.regular import check_regular
from mea_ray.data.skipped import Skipped

SYSTEM_NAMES = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin", "system volume information"}  # Windows, macOS
    | {
        "__macosx",
        "lost+found",
        "@eadir",
        "@tmp",
        "@recycle",
        "#recycle",
        "#snapshot",
    }  # archives, Linux, network disks
    | {"__pycache__", "_temporary"}  # Python, Spark
)
"""Names, in lower case, of files and folders that the system makes, not the user."""

ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
"""Suffixes, in lower case, of files that may contain a user's data and are not opened."""

_LFS = b"version https://git-lfs.github.com/spec/"

HIDDEN = "hidden files and folders"
SYSTEM = "system files and folders"
OTHER_TYPE = "files of other types"
PACKED = "archives, which must be unpacked first"
BROKEN_LINKS = "broken links"
LOOPS = "links to a folder above them"
SPECIAL = "sockets, pipes and devices"
SECOND_LINKS = "links to what is read anyway"


@dataclass(frozen=True)
class File:
    """A file found by a walk.

    Attributes:
        path: Its path as it was reached.
        real: Its path without links.
        folders: Names of the folders between the root of the walk and the file.
        linked: The path leads through a link below the root.
    """

    path: Path
    real: str
    folders: tuple[str, ...]
    linked: bool


@dataclass
class Walk:
    """The files and folders that a walk visited.

    Attributes:
        files: Files with one of the wanted suffixes, sorted by path, component by component.
        folders: Visited folders below the root, each as the names that lead to it; sorted.
    """

    files: list[File] = field(default_factory=list)
    folders: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Folder:
    path: str
    real: str
    names: tuple[str, ...]
    linked: bool


def existing_folder(path: str) -> Path:
    """Return the folder at ``path``, ``~`` expanded.

    Raises:
        DataError: There is none.
    """
    root = expanded(path)
    if root.is_dir():
        return root
    if root.exists():
        unpacked = (
            "unpack it, and give the new folder" if root.suffix.lower() in ARCHIVES else "give the folder above it"
        )
        raise DataError(f"{str(root)!r} is a file, and data.path must be a folder here; {unpacked}")
    raise DataError(f"there is no folder {str(root)!r}; check data.path")


def expanded(path: str) -> Path:
    """Return ``path`` with ``~`` expanded.

    Raises:
        DataError: It cannot be a path, or is a pipe, a socket or a device.
    """
    try:
        expanded = Path(path).expanduser()
        check_regular(expanded)
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"cannot open {path!r}: {error}; check data.path") from None
    return expanded


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer: a placeholder for a file that was not downloaded."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS)) == _LFS
    except (OSError, ValueError):  # ValueError: a path with a null character
        return False


def walk(root: Path, suffixes: frozenset[str], skipped: Skipped) -> Walk:
    """Find the files below a folder that have one of some suffixes.

    Every folder is visited once by its own path and at most once through links. Loops of links therefore end.

    Args:
        root: Where to begin. Its own name may be hidden.
        suffixes: Wanted suffixes, in lower case, with the dot. Suffixes of files are compared without case.
        skipped: Counts what is left out.

    Raises:
        DataError: A folder cannot be read.
    """
    walked = Walk()
    start = _Folder(str(root), os.path.realpath(root), (), linked=False)
    waiting, links = [start], list[_Folder]()
    seen: set[tuple[str, bool]] = set()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        if (folder.real, folder.linked) in seen:
            skipped.add(SECOND_LINKS, folder.path)
            continue
        seen.add((folder.real, folder.linked))
        if folder.names:
            walked.folders.append(folder.names)
        for entry in visible(folder.path, skipped):
            kind = _kind(entry, folder, start.real, skipped)
            suffix = os.path.splitext(entry.name)[1].lower()
            if isinstance(kind, _Folder):
                (links if kind.linked and not folder.linked else waiting).append(kind)
            elif isinstance(kind, File) and suffix in suffixes:
                walked.files.append(kind)
            elif kind is not None:
                packed = suffix in ARCHIVES
                skipped.add(PACKED if packed else OTHER_TYPE, entry.name if packed else suffix or entry.name)
    walked.files.sort(key=lambda file: (*file.folders, file.path.name))
    walked.folders.sort()
    return walked


def visible(folder: str | Path, skipped: Skipped) -> list[os.DirEntry[str]]:
    """List a folder by name, without hidden entries and those of the system.

    Raises:
        DataError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"cannot read the folder {str(folder)!r}: {error.strerror or error}; check its permissions, or move it"
        ) from None
    return [entry for entry in listed if not left_out(entry.name, skipped)]


def left_out(name: str, skipped: Skipped) -> bool:
    """Return whether a name is hidden or belongs to the system; count it if so."""
    if name.startswith("."):
        skipped.add(HIDDEN, name)
    elif name.lower() in SYSTEM_NAMES:
        skipped.add(SYSTEM, name.strip())
    else:
        return False
    return True


def without_second_links(files: Iterable[File], skipped: Skipped) -> list[File]:
    """Drop files that are in the list twice, because a link leads to them.

    A file's own path stays rather than a link to it, and the first link rather than later ones.
    """
    listed = list(files)
    keep: dict[str, File] = {}
    for file in listed:
        if file.real not in keep or (keep[file.real].linked and not file.linked):
            keep[file.real] = file
    for file in listed:
        if keep[file.real] is not file:
            skipped.add(SECOND_LINKS, str(file.path))
    return [file for file in listed if keep[file.real] is file]


def _kind(entry: os.DirEntry[str], parent: _Folder, root: str, skipped: Skipped) -> _Folder | File | None:
    """Return a folder to visit or a regular file; None for an entry that is left out."""
    linked = entry.is_symlink()
    real = os.path.realpath(entry.path) if linked else os.path.join(parent.real, entry.name)
    try:
        mode = entry.stat().st_mode
    except OSError:  # also a link to itself
        skipped.add(BROKEN_LINKS, entry.path)
        return None
    if stat.S_ISDIR(mode):
        if linked and any(_is_within(place, real) for place in (root, parent.real)):
            skipped.add(LOOPS, entry.path)
            return None
        return _Folder(entry.path, real, (*parent.names, entry.name), linked or parent.linked)
    if stat.S_ISREG(mode):
        return File(Path(entry.path), real, parent.names, linked or parent.linked)
    skipped.add(SPECIAL, entry.path)
    return None


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
