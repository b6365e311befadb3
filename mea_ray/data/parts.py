"""Recognises train, test and validation by the names of files and folders, in the same way for every loader."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Literal, TypeVar

from mea_ray.core.errors import DataError
from mea_ray.data.skipped import warn
from mea_ray.storage.files import sha256

Part = Literal["train", "test", "validation"]
T = TypeVar("T")

_WORDS: dict[str, Part] = {
    **dict.fromkeys(("train", "training", "trainval", "trn"), "train"),
    **dict.fromkeys(("test", "testing", "tst", "holdout"), "test"),
    **dict.fromkeys(
        ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"), "validation"
    ),
}
_NEUTRAL = frozenset(
    {"set", "split", "part", "data", "dataset", "seg", "folder", "file", "files", "parquet", "jpg", "png"}
    | {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "sample", "samples", "full"}
)
"""Neutral words: ``seg_train`` and ``train_images`` are parts, ``train_station`` is not."""
_JOINED = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})(set|split|data|images?|imgs?)?")
_WORD_STARTS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_HOLD_OUT = re.compile(r"hold[-_. ]out", re.IGNORECASE)
_SHARD = re.compile(r"(?P<head>.*?)(?P<index>\d{1,12})(?P<of>[-_.]of[-_.])(?P<total>\d{1,12})(?P<tail>.*)", re.DOTALL)
_NUMBERED = re.compile(r"(?P<head>.*?)(?P<index>\d{1,12})", re.DOTALL)
_EXAMPLES = 5


def parts_of(names: Collection[str], *, prefixes: bool = False) -> dict[str, Part]:
    """Find which of several sibling names are those of parts.

    Case, separators, digits and neutral words do not matter: ``Train``, ``TESTING``, ``val_set``,
    ``seg_train``, ``trainImages`` and ``train2017`` are parts. Names with other words are parts if they differ in the
    word for the part alone, as ``cifar_train`` and ``cifar_test``.

    Args:
        names: Names of files (without suffix) or of folders in one folder.
        prefixes: Also accept names that only begin with the word, as ``train_fold3``. For files, which are not classes.

    Returns:
        The part of each name that is one.
    """
    read = {name: parts for name in names if (parts := _read(name)) is not None}
    return {
        name: part
        for name, (part, rest) in read.items()
        if _NEUTRAL.issuperset(rest)
        or any(rest == others and part != other for other, others in read.values())
        or (prefixes and _JOINED.fullmatch(_split(name)[0]))
    }


def mentioned_parts(names: Collection[str]) -> dict[str, Part]:
    """Return the part of each name that contains the word for one, whatever its other words."""
    return {name: parts[0] for name in names if (parts := _read(name)) is not None}


def is_neutral(name: str) -> bool:
    """Return whether a folder's name consists of neutral words, as ``images``."""
    words = _split(name)
    return bool(words) and _NEUTRAL.issuperset(words)


def without_shard(stem: str) -> str:
    """Return a file's stem without the number of a shard: ``train-00003-of-00005-5b3e`` becomes ``train-``."""
    match = _SHARD.fullmatch(stem)
    return (match["head"] or match["tail"]) if match else stem


def check_shards(files: Sequence[Path], *, listed: bool = False) -> None:
    """Check that numbered files ``...-00000-of-00005`` are complete, have one total, and occur once each.

    They are numbered from 0, or from 1 if the last number is the total.
    Files numbered without a total may be incomplete; a gap between their numbers causes a warning.

    Args:
        files: The files of one part of a dataset.
        listed: The user listed each file; problems then cause a warning only.

    Raises:
        DataError: A shard is missing, occurs twice, or is beyond the total; two totals are mixed; or shards lie beside
            whole files.
    """
    problem = _problem_of_shards(files)
    if problem and listed:
        warn(f"{problem[0]}; they are read as they are listed")
    elif problem:
        raise DataError(f"{problem[0]}; {problem[1]}, or list the wanted files in data.path to use them as they are")


def check_copies(files: Sequence[Path], *, listed: bool = False) -> None:
    """Check that no file is a copy of another one, byte by byte: its images would count twice.

    Args:
        files: The files of one part of a dataset.
        listed: The user listed each file; a copy then causes a warning only.

    Raises:
        DataError: Two files have the same content.
    """
    sizes: dict[int, list[Path]] = {}
    for file in files:
        sizes.setdefault(_read_from(file, lambda path: path.stat().st_size), []).append(file)
    for group in sizes.values():
        known: dict[str, Path] = {}
        for file in group if len(group) > 1 else ():
            first = known.setdefault(_read_from(file, sha256), file)
            if first is file:
                continue
            problem = f"{first} and {file} have the same content"
            if not listed:
                raise DataError(f"{problem}; remove one, or list the wanted files in data.path to use them as they are")
            warn(f"{problem}; they are read as they are listed")


def _read_from(file: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(file)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}; replace or remove the file") from None


def _problem_of_shards(files: Sequence[Path]) -> tuple[str, str] | None:
    """Return a problem of numbered files and its remedy; None if there is none."""
    matches = {file: match for file in files if (match := _SHARD.fullmatch(file.stem))}
    if not matches:
        _warn_of_gaps(files)
        return None
    if whole := [file for file in files if file not in matches]:
        return f"{whole[0]} stands beside the shards {next(iter(matches)).name}", "remove one or the other"
    totals: dict[int, Path] = {}
    indices: dict[int, Path] = {}
    for file, match in matches.items():
        index, total = int(match["index"]), int(match["total"])
        totals.setdefault(total, file)
        if len(totals) > 1:
            left, right = totals.values()
            return f"{left} and {right} belong to different divisions of a dataset", "remove one"
        if index in indices:
            return f"{indices[index]} and {file} are both number {index} of {total}", "remove one"
        indices[index] = file
    start = 1 if total in indices and 0 not in indices else 0  # hubs number from 0, many scripts from 1
    if beyond := [index for index in indices if index >= total + start]:
        file = indices[beyond[0]]
        return f"{file} is number {beyond[0]} of {total}, which are numbered from {start}", "remove it"
    missing = total - len(indices)
    if not missing:
        return None
    one = next(iter(matches.values()))
    pattern = f"{one['head']}*{one['of']}{one['total']}"
    width = len(one["index"])
    first = [f"{i:0{width}}" for i in islice((i for i in count(start) if i not in indices), min(missing, _EXAMPLES))]
    return (
        f"{len(indices):,} of the {total:,} files {pattern} are in {files[0].parent}; {_list(first, missing)} "
        f"{'is' if missing == 1 else 'are'} missing",
        "complete the download",
    )


def _warn_of_gaps(files: Sequence[Path]) -> None:
    """Warn of missing numbers among files that are numbered from 0 or 1 on."""
    matches = [match for file in files if (match := _NUMBERED.fullmatch(file.stem))]
    numbers = {int(match["index"]) for match in matches}
    if len(matches) < len(files) or len({match["head"] for match in matches}) > 1 or not 0 <= min(numbers) <= 1:
        return
    if missing := max(numbers) + 1 - min(numbers) - len(numbers):
        gap = next(number for number in count(min(numbers)) if number not in numbers)
        warn(
            f"{files[0].parent}: the files {matches[0]['head']}* are numbered from {min(numbers)} to {max(numbers)}, "
            f"{missing:,} are missing, e.g. {gap}"
        )


def only_one(part: Part, names: Iterable[str], where: Path) -> None:
    """Refuse two folders for one part.

    Raises:
        DataError: ``names`` has two names or more.
    """
    listed = sorted(names)
    if len(listed) > 1:
        raise DataError(
            f"{where} has {len(listed)} folders for the {part} part: {', '.join(listed)}; rename all but one, or set "
            "data.path to the folder that is meant"
        )


def _list(first: list[str], total: int) -> str:
    if total > len(first):
        return f"{', '.join(first)} and {total - len(first):,} more"
    return f"{', '.join(first[:-1])} and {first[-1]}" if len(first) > 1 else first[0]


def _read(name: str) -> tuple[Part, tuple[str, ...]] | None:
    """Return the part in a name and its other words; None if it names no part, or several."""
    parts: set[Part] = set()
    rest = []
    for word in _split(name):
        if match := _JOINED.fullmatch(word):
            parts.add(_WORDS[match[1]])
        else:
            rest.append(word)
    if parts == {"train", "validation"}:  # one folder of both, for training
        parts = {"train"}
    return (parts.pop(), tuple(rest)) if len(parts) == 1 else None


def _split(name: str) -> list[str]:
    """Return the words of a name in lower case: runs of letters, cut where a capital begins (but not ``TESTset``)."""
    words: list[str] = []
    name = _HOLD_OUT.sub(" holdout ", name)
    for run in re.findall(r"[^\W\d_]+", name):
        words += [run.lower()] if _JOINED.fullmatch(run.lower()) else _WORD_STARTS.sub(" ", run).lower().split()
    return words
