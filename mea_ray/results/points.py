"""Texts of a sweep's points and settings, for tables and legends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def setting(value: Any) -> str:
    """Return the short text of a config value: a component by its name and parameters."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    value = _inner(value)
    if isinstance(value, Mapping):
        rest = ", ".join(_parameter(key, item) for key, item in value.items() if key != "name")
        name = str(value.get("name", ""))
        return f"{name}({rest})" if name and rest else name or rest
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "[]"
    return "null" if value is None else str(value)


def _parameter(key: str, value: Any) -> str:
    grouped = isinstance(value, Mapping) and "name" not in value
    return f"{key}({setting(value)})" if grouped else f"{key}={setting(value)}"


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


def short_paths(paths: Sequence[str]) -> dict[str, str]:
    """Return for each config path its shortest unique suffix, without ``name``: ``eva.weight``, ``model``."""
    plain = {path: path.removesuffix(".name").split(".") for path in paths}
    short = {}
    for path, parts in plain.items():
        least = 2 if parts[-1] == "weight" else 1  # each loss has one
        ends = (".".join(parts[-count:]) for count in range(least, len(parts) + 1))
        others = [".".join(other) for each, other in plain.items() if each != path]
        short[path] = next(
            (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), ".".join(parts)
        )
    return short


def short_name(point: Mapping[str, Any], short: Mapping[str, str], *, seeds: bool = False) -> str:
    """Return the settings of a point by their short paths, with numbers rounded to three digits."""
    parts = [
        f"{short[path]}={f'{value:.3g}' if isinstance(value, float) else setting(value)}"
        for path, value in point.items()
        if seeds or not is_seed(path)
    ]
    return ", ".join(parts) or "all trials"


def sort_key(point: Mapping[str, Any]) -> list[tuple[str, bool, float, str]]:
    """Return the sort key of a point: numbers by size, before everything else, which is sorted as text."""
    key = []
    for path, value in point.items():
        is_number = isinstance(value, (int, float))
        key.append((path, not is_number, float(value) if is_number else 0.0, setting(value)))
    return key


def shortened(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return points that show only what distinguishes each component from the others.

    Components of different names show their names. Several of one name also show the parameters in which they differ.
    A watermark of several keys is named after the scheme that embeds them. Of whole sections (``thief``), the settings
    in which they differ remain; a section without any is ``plain``.

    Args:
        points: All points of a sweep.
    """
    short = [{path: _inner(value) for path, value in point.items()} for point in points]
    for path in dict.fromkeys(path for point in points for path in point):
        same_name: dict[str, list[dict[str, Any]]] = {}
        for point in short:
            value = point.get(path)
            if isinstance(value, Mapping):
                same_name.setdefault(str(value.get("name", "")), []).append(point)
        for name, places in same_name.items():
            if not name and len(places) == 1:
                continue
            for point, rest in zip(places, _differing([point[path] for point in places]), strict=True):
                point[path] = {"name": name, **rest} if name else rest or "plain"
    return short


def _inner(value: Any) -> Any:
    """Return the scheme of ``several_keys``, named e.g. ``2 keys of mea_carrier``; any other value as it is."""
    if not isinstance(value, Mapping) or not isinstance(scheme := value.get("of"), Mapping):
        return value
    return {**scheme, "name": f"{value.get('keys', 'several')} keys of {scheme.get('name', '')}"}


def _differing(values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each mapping the entries in which the mappings differ, including inner mappings."""
    differing: list[dict[str, Any]] = [{} for _ in values]
    for key in dict.fromkeys(key for value in values for key in value):
        nested = [value[key] for value in values if key in value]
        if len(nested) == len(values) and all(each == nested[0] for each in nested):
            continue
        inner = len(nested) == len(values) and all(isinstance(each, Mapping) for each in nested)
        parts: list[Any] = list(_differing(nested)) if inner else nested
        for place, part in zip((p for p, value in enumerate(values) if key in value), parts, strict=True):
            if part != {}:
                differing[place][key] = part
    return differing
