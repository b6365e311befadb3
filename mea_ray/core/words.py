"""Words for messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(word: str, words: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``words``, or an empty string."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest_and_known(word: str, words: Sequence[str]) -> str:
    """Return the end of a message on an unknown ``word``: ``nearest`` of it, and the list of ``words``."""
    return f"{nearest(word, words) or '.'} Known: {', '.join(words) or 'none'}"
