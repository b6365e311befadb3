"""Texts and settings without what names a machine, a folder or an account: what may be published."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

_PATH = re.compile(r"(?:\b(?!https?:)[a-z][a-z0-9+]*://|~[\w.-]*/|(?<![\w./~:])/)[^\s'\",\]}]+")
_ACCOUNT = ("entity", "group")
"""Settings of ``tracking`` that name a W&B account or its runs."""


def without_paths(text: str) -> str:
    """Replace absolute paths and URIs in a text by their last part."""
    return _PATH.sub(lambda match: match[0].rstrip("/").rpartition("/")[2], text)


def portable(command: str) -> str:
    """Return a command without what is of one machine only: its storage, and the folders of its paths."""
    try:
        words = shlex.split(command)
    except ValueError:  # typed by hand, with an open quote
        return without_paths(command)
    return shlex.join(without_paths(word) for word in words if not word.startswith("storage="))


def cleaned(value: Any) -> Any:
    """Return a tree whose texts hold no paths."""
    if isinstance(value, Mapping):
        return {key: cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


def anonymous(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its storage, its W&B account, and the folders of its paths."""
    rest = {key: cleaned(value) for key, value in config.items() if key != "storage"}
    if isinstance(tracking := rest.get("tracking"), Mapping):
        rest["tracking"] = {key: value for key, value in tracking.items() if key not in _ACCOUNT}
    return rest
