"""A CSV of all rungs of all trials, for spreadsheets and pandas."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_ray.results import TrialResult
from mea_ray.tracking.rows import rows


class FilesTracker:
    """Keeps ``summary.csv`` up to date: one line per rung, written anew after each trial.

    Args:
        folder: The sweep's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "summary.csv"
        self._results: dict[str, TrialResult] = {}

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Do nothing: ``sweep.yaml`` is there already."""

    def log(self, result: TrialResult, models: Mapping[str, Path]) -> None:
        """Add a trial to the table."""
        self._results[result.trial] = result
        self._write()

    def summarize(self, results: Sequence[TrialResult]) -> None:
        """Write the table of all trials."""
        self._results = {result.trial: result for result in results}
        self._write()

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _write(self) -> None:
        lines = [row for result in self._results.values() for row in rows(result)]
        columns = list(dict.fromkeys(name for line in lines for name in line))
        aside = self.path.with_name(f".{self.path.name}")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(lines)
        aside.replace(self.path)
