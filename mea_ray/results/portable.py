"""Texts and settings without names of machines, folders or accounts, for publication."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

_PATH = re.compile(r"(?:\b(?!https?:)[a-z][a-z0-9+]*://|~[\w.-]*/|(?<![\w./~:])/)[^\s'\",\]}]+")
_WHOLE_PATH = re.compile(r"(?:(?!https?:)[a-z][a-z0-9+]*://|~[^/]*/|/)[^\n]*\Z")
_ACCOUNT = ("entity", "group")
"""Settings of ``tracking`` that name a W&B account or its runs."""


def without_paths(text: str) -> str:
    """Replace absolute paths and URIs in a text by their last part."""
    return _PATH.sub(lambda match: _last_part(match[0]), text)


def portable(command: str) -> str:
    """Return a command without machine-specific parts: its storage, and the folders of its paths."""
    try:
        words = shlex.split(command)
    except ValueError:  # typed by hand, with an open quote
        return without_paths(command)
    return shlex.join(without_paths(word) for word in words if not word.startswith("storage="))


def cleaned(value: Any) -> Any:
    """Return a tree whose texts contain no paths."""
    if isinstance(value, Mapping):
        return {key: cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(item) for item in value]
    if not isinstance(value, str):
        return value
    # A text that is a path as a whole can contain what ends a path inside a sentence: spaces, quotes, commas.
    return _last_part(value) if _WHOLE_PATH.match(value) else without_paths(value)


def portable_point(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's point without the folders of paths; different paths remain different."""
    return {path: _distinct(value) for path, value in point.items()}


def _distinct(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _distinct(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_distinct(item) for item in value]
    short = cleaned(value)
    if short == value:
        return value
    return f"{short}~{hashlib.sha256(str(value).encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def anonymous(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its storage, its W&B account, and the folders of its paths."""
    rest = {key: cleaned(value) for key, value in config.items() if key != "storage"}
    if isinstance(tracking := rest.get("tracking"), Mapping):
        rest["tracking"] = {key: value for key, value in tracking.items() if key not in _ACCOUNT}
    return rest
