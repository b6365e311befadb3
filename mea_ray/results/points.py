"""How a point of a sweep, and the settings in it, are written in tables and legends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def setting(value: Any) -> str:
    """Return the short form of a config value: a component by its name and the parameters beside it."""
    if isinstance(value, Mapping):
        rest = ", ".join(f"{key}={setting(item)}" for key, item in value.items() if key != "name")
        name = str(value.get("name", ""))
        return f"{name}({rest})" if name and rest else name or rest
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "[]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value)


def is_seed(path: str) -> bool:
    """Return whether a config path is a seed. Trials that differ only in seeds repeat one point of the sweep."""
    return path.rpartition(".")[2] == "seed"


def label(point: Mapping[str, Any], *, seeds: bool = False) -> str:
    """Return the name of a point of the sweep, e.g. ``thief.model=resnet18``.

    Args:
        point: The config paths that the sweep set, and their values.
        seeds: Whether seeds are part of the name.
    """
    parts = [f"{path.removesuffix('.name')}={setting(v)}" for path, v in point.items() if seeds or not is_seed(path)]
    return ", ".join(parts) or "all trials"


def sort_key(point: Mapping[str, Any]) -> list[tuple[str, bool, float, str]]:
    """Return what points are sorted by: numbers by size, before everything else, which is sorted as text."""
    key = []
    for path, value in point.items():
        is_number = isinstance(value, (int, float))
        key.append((path, not is_number, float(value) if is_number else 0.0, setting(value)))
    return key
