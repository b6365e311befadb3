"""Counts the files that a loader did not read, for one warning."""

from __future__ import annotations

import logging
from collections import Counter
from functools import lru_cache

logger = logging.getLogger(__name__)

_EXAMPLES = 3


class Skipped:
    """Counts of files and folders that were left out."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count something that was left out.

        Args:
            reason: What it is, in the plural, e.g. ``"hidden files and folders"``.
            example: A name or suffix to show; listed once.
            count: How many.
        """
        self._counts[reason] += count
        examples = self._examples.setdefault(reason, [])
        if example not in examples:
            examples.append(example)

    def __getitem__(self, reason: str) -> int:
        return self._counts[reason]

    def __str__(self) -> str:
        return "; ".join(
            f"{count:,} {reason} ({', '.join(self._examples[reason][:_EXAMPLES])}"
            f"{', ...' if len(self._examples[reason]) > _EXAMPLES else ''})"
            for reason, count in self._counts.items()
        )

    def warn(self, where: str) -> None:
        """Log one warning with all counts, unless nothing was left out.

        Args:
            where: The folder or file that was read.
        """
        if self._counts:
            warn(f"{where}: not read: {self}")


@lru_cache(maxsize=256)
def warn(message: str) -> None:
    """Log a warning once in a process: a dataset may be loaded several times."""
    logger.warning(message)
