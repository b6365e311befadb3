"""A CSV of all rungs of all trials, for spreadsheets and pandas; it grows as trials finish."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mea_ray.results.records import TrialResult
from mea_ray.tracking.rows import rows


class FilesTracker:
    """Writes ``summary.csv``: rows of a finished trial, one per rung, are appended in one write and not changed again.

    Only a new column, for a number that no earlier trial had, makes it rewrite the file.

    Args:
        folder: The sweep's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "summary.csv"
        self._columns: list[str] | None = None
        self._there: set[str] = set()

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Do nothing: ``sweep.yaml`` has the config."""

    def log(self, result: TrialResult, models: Mapping[str, Path]) -> None:
        """Add a trial to the table, unless it contains it."""
        columns = self._open() if self._columns is None else self._columns
        if result.trial in self._there:
            return
        lines = rows(result)
        new = [name for name in dict.fromkeys(name for line in lines for name in line) if name not in columns]
        if new:
            self._columns = columns = columns + new
            self._write(self._read())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(_text(columns, lines))  # in one write: a reader sees all of a trial or nothing
        self._there.add(result.trial)

    def summarize(self, results: Iterable[TrialResult]) -> None:
        """Add missing trials."""
        for result in results:
            self.log(result, {})

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _open(self) -> list[str]:
        """Read the table of an earlier start; an incomplete last row is dropped."""
        lines = self._read()
        if lines and not self.path.read_bytes().endswith(b"\n"):
            torn = lines[-1]["trial"]
            lines = [line for line in lines if line["trial"] != torn]
            self._columns = list(lines[0]) if lines else []
            self._write(lines)
        self._there = {line["trial"] for line in lines}
        self._columns = list(lines[0]) if lines else []
        return self._columns

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        assert self._columns is not None
        aside = self.path.with_name(f".{self.path.name}")
        header = _text(self._columns, [dict(zip(self._columns, self._columns, strict=True))])
        aside.write_text(header + _text(self._columns, lines), encoding="utf-8", newline="")
        aside.replace(self.path)


def _text(columns: list[str], lines: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO(newline="")
    csv.DictWriter(buffer, columns).writerows(lines)
    return buffer.getvalue()
