"""Maps the labels of several tables to one list of classes: by name, or by number where there are no names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import UNLABELLED, Labels
from mea_ray.data.classes import in_order, warn_of_names
from mea_ray.data.skipped import warn

MAX_CLASSES = 2**17
"""Maximum number of classes. A column with more distinct labels holds row numbers, hashes, measurements, ..."""

Names = tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """The labels of one table as they are stored.

    Attributes:
        source: The file, for messages.
        name: Name of the column.
        values: Distinct labels that occur, integers or strings; -1 and missing labels are not among them.
        positions: Position in ``values`` of each row's label, int64, (N,); -1 for a row without a label.
        class_names: Class names that the file itself gives its integers, from 0 on; empty if it gives none.
    """

    source: str
    name: str
    values: tuple[int | str, ...]
    positions: Labels
    class_names: Names

    @property
    def texts(self) -> bool:
        """Labels are strings."""
        return any(isinstance(value, str) for value in self.values)

    @property
    def unlabelled(self) -> int:
        """Number of rows without a label."""
        return int((self.positions < 0).sum())


def column_of(source: str, name: str, values: Sequence[int | str], rows: Labels, names: Names) -> Column:
    """Make a column of stored labels.

    Args:
        source: The file, for messages.
        name: Name of the column.
        values: Distinct labels in any order: integers, -1 for an unlabelled image as on hubs, or strings.
        rows: Position in ``values`` of each row's label, int64, (N,); -1 for a row without one.
        names: Class names in the file.

    Raises:
        DataError: A label is below -1, there are too many different ones, or the names repeat.
    """
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise DataError(f"{source} names two of its classes {twice!r}; correct its metadata, or remove it")
    remedy = "set data.label_column to the column of the classes"
    if len(values) > MAX_CLASSES:
        raise DataError(
            f"{source}: column {name!r} has {len(values):,} different labels, and there are at most "
            f"{MAX_CLASSES:,} classes; {remedy}"
        )
    numbers = [value for value in values if isinstance(value, int)]
    if numbers and min(numbers) < UNLABELLED:
        raise DataError(
            f"{source}: column {name!r} has the label {min(numbers)}; labels are 0 or more, and -1 for images without "
            f"one; {remedy}"
        )
    occurring = [values[position] for position in np.unique(rows[rows >= 0])]
    order = sorted({value for value in occurring if value != UNLABELLED})
    place = {value: position for position, value in enumerate(order)}
    # The last entry is for position -1: no label.
    moved = np.array([*(place.get(value, -1) for value in values), -1], np.int64)
    return Column(source, name, tuple(order), moved[rows], names if numbers else ())


def unify(columns: Sequence[Column], wanted: Names | None) -> tuple[Names, list[Labels]]:
    """Bring the labels of all tables to one list of classes.

    - Integers are replaced by the names in their own file. Files that number the classes differently thus agree.
    - Integers of a file without names are replaced by the names in the other files, or by position in ``wanted``.
    - Without any names, each distinct integer is a class with the number as its name: gaps are closed.
    - Strings are sorted, as numbers if all are whole numbers.
    - Classes without an image are dropped.

    Args:
        columns: One for each table.
        wanted: Class names of the config: the order of the classes, and new names for integers; None takes the files'.

    Returns:
        Names of all classes, and for each column int64 labels (N,) in [0, classes), -1 for rows without one.

    Raises:
        ConfigError: ``wanted`` repeats a name.
        DataError: Integers and strings are mixed, a label has no name, or names contradict each other.
    """
    if wanted is not None and len(set(wanted)) < len(wanted):
        raise ConfigError(f"data.class_names={list(wanted)} repeats a name; give each class one of its own")
    labelled = [column for column in columns if column.values]
    lists = list(dict.fromkeys(column.class_names for column in labelled if column.class_names))
    if any(column.texts for column in labelled) and any(not c.texts and not lists for c in labelled):
        raise DataError(
            f"labels in column {columns[0].name!r} are integers in some files and strings in others; use one type"
        )
    meanings = {id(column): _meanings(column, lists) for column in labelled}
    if lists or any(column.texts for column in labelled):
        order, renamed = _by_name(labelled, meanings, lists, wanted)
    else:
        order, renamed = _by_number(labelled, wanted)
    used = {renamed[meaning] for each in meanings.values() for meaning in each}
    names = tuple(name for name in order if name in used)
    _warn_of_changes(columns, order, names, lists, wanted)
    place = {name: position for position, name in enumerate(names)}
    labels = []
    for column in columns:
        # The last entry is for position -1: no label.
        table = [place[renamed[meaning]] for meaning in meanings.get(id(column), ())]
        labels.append(np.array([*table, UNLABELLED], np.int64)[column.positions])
    return names, labels


def _meanings(column: Column, lists: list[Names]) -> list[int | str]:
    """Return what each value of a column stands for: a name, or a number where nothing names it."""
    if column.texts or not lists:
        return list(column.values)
    names = column.class_names
    if not names:
        if len(lists) > 1:
            raise DataError(
                f"{column.source} numbers its classes without naming them, and the other files name them in different "
                "orders; add the names to the file, or leave it out"
            )
        names = lists[0]
    highest = int(column.values[-1])
    if highest >= len(names):
        raise DataError(
            f"{column.source}: labels in column {column.name!r} go from {column.values[0]} to {highest}, with "
            f"{len(names)} class names they must lie in [0, {len(names)}); correct the file's labels or class names"
        )
    return [names[int(value)] for value in column.values]


def _by_name(
    columns: list[Column], meanings: dict[int, list[int | str]], lists: list[Names], wanted: Names | None
) -> tuple[list[str], dict[int | str, str]]:
    """Return the order of the classes, and what each name of the files is called."""
    listed = dict.fromkeys(name for names in lists for name in names)
    used_names = {str(meaning) for column in columns for meaning in meanings[id(column)]}
    if wanted is None:
        order = [*listed, *in_order(used_names.difference(listed))]
        return order, {name: name for name in order}
    if used_names.issubset(wanted):
        return list(wanted), {name: name for name in wanted}
    # New names for the numbers of one list, as long as names that stay keep their number.
    same_numbers = len(lists) == 1 and all(
        lists[0].index(name) == number for number, name in enumerate(wanted) if name in listed
    )
    if same_numbers and all(name in listed and lists[0].index(name) < len(wanted) for name in used_names):
        return list(wanted), dict(zip(lists[0], wanted, strict=False))
    unknown = sorted(used_names.difference(wanted))[0]
    raise DataError(
        f"label {unknown!r} in column {columns[0].name!r} is not among data.class_names {list(wanted)}; the files have "
        f"{sorted(used_names)}"
    )


def _by_number(columns: list[Column], wanted: Names | None) -> tuple[list[str], dict[int | str, str]]:
    """Return the names of numbered classes in order, and the name of each number."""
    numbers = sorted({int(value) for column in columns for value in column.values})
    if wanted is None:
        return list(map(str, numbers)), {number: str(number) for number in numbers}
    if numbers and numbers[-1] < len(wanted):
        return list(wanted), {number: wanted[number] for number in numbers}
    if numbers and numbers[0] == 1 and numbers[-1] == len(wanted):
        warn(f"labels in column {columns[0].name!r} go from 1 to {len(wanted)}: the first of data.class_names is 1")
        return list(wanted), {number: wanted[number - 1] for number in numbers}
    if not numbers:
        return [], {}
    raise DataError(
        f"labels in column {columns[0].name!r} go from {numbers[0]} to {numbers[-1]}, with {len(wanted)} class names "
        f"they must lie in [0, {len(wanted)}); give one name for each number from 0 on in data.class_names, or null "
        "to name the classes by their numbers"
    )


def _warn_of_changes(
    columns: Sequence[Column], order: list[str], names: Names, lists: list[Names], wanted: Names | None
) -> None:
    """Warn when classes are not numbered as in the files."""
    dropped = [name for name in order if name not in set(names)]
    where = f"column {columns[0].name!r} of {columns[0].source}"
    if dropped and names:
        warn(f"{where}: {len(dropped)} of {len(order)} classes have no image and are dropped, e.g. {dropped[0]!r}")
    numbered = not lists and wanted is None and not any(column.texts for column in columns)
    if numbered and names != tuple(map(str, range(len(names)))):
        warn(
            f"{where}: the {len(names)} labels go from {names[0]} to {names[-1]}; as classes they are numbered from 0 "
            "without gaps, and keep their numbers as names"
        )
    elif wanted is None:
        warn_of_names(names, where)
