"""The rows of a page's tables, in the form that its template expects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One cell: its text, or ready markup, and its CSS classes."""

    text: Any
    classes: str = ""


@dataclass(frozen=True)
class Line:
    """One row: its cells, the first of which is its heading, and a tooltip."""

    cells: tuple[Cell, ...]
    hint: str = ""


def plain(lines: Iterable[Iterable[Any]], text: Collection[int] = ()) -> list[Line]:
    """Return rows of cells; the columns in ``text`` contain words, aligned to the left."""
    return [
        Line(tuple(Cell(each, "text" if place in text else "") for place, each in enumerate(line))) for line in lines
    ]


def of_rows(
    rows: Iterable[Any],
    headings: Mapping[str, str],
    *,
    text: Collection[str] = (),
    toned: str = "",
    hint: str = "",
) -> list[Line]:
    """Return the rows of records whose attributes are display texts.

    Args:
        rows: The records.
        headings: Heading of each column, by attribute.
        text: Columns that contain words.
        toned: Column that is shown in the colour of the record's ``tone``.
        hint: Format of the tooltip, with the record as ``row``.
    """
    return [
        Line(
            tuple(
                Cell(
                    getattr(row, column),
                    " ".join([*(["text"] if column in text else []), *([row.tone] if column == toned else [])]),
                )
                for column in headings
            ),
            hint.format(row=row),
        )
        for row in rows
    ]
