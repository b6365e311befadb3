"""The settings of a run: those that differ from the defaults, those that the sweep varied, versions and devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mea_ray.config import ExperimentConfig, Tree, build
from mea_ray.core.errors import ConfigError
from mea_ray.report.tables import DASH
from mea_ray.results.points import setting
from mea_ray.results.records import FilterRecord, TrialResult

MOST_VALUES = 6
"""Maximum number of listed values of one kind."""
LISTED_VALUES = 24
"""Maximum number of listed values of a setting."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{config path: value}`` for every leaf of a tree."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _names_only(tree: Mapping[str, Any]) -> Tree:
    names: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            inner = _names_only(value)
            if inner:
                names[key] = inner
        elif key == "name":
            names[key] = value
    return names


def defaults_of(config: Tree) -> dict[str, Any]:
    """Return the default of every config path, with the parameters of the components that ``config`` chose.

    The choice of a component itself is compared with the default choice.
    """
    plain = flatten(build(ExperimentConfig, {}).resolved())
    try:
        chosen = flatten(build(ExperimentConfig, _names_only(config)).resolved())
    except (ConfigError, ImportError):  # a result of another version: its components may not exist any more
        return plain
    return {**chosen, **{path: value for path, value in plain.items() if path.endswith(".name")}}


@dataclass(frozen=True)
class Setting:
    """One config path that differs from its default, or that the sweep varied, as display texts."""

    path: str
    value: str
    default: str


def changed(results: Sequence[TrialResult]) -> list[Setting]:
    """Return the settings that all trials share and that differ from the defaults."""
    first, *others = [result.config for result in results]
    shared = flatten(first)
    for config in others:
        _leave_out(shared, first, config)
    defaults = defaults_of(first)
    return [
        Setting(path, setting(value), setting(defaults[path]) if path in defaults else DASH)
        for path, value in shared.items()
        if path not in defaults or defaults[path] != value
    ]


def _leave_out(shared: dict[str, Any], first: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> None:
    """Remove from the leaves of ``first`` those that ``other`` does not have, or has with another value.

    Trials of a sweep differ in a few places, so whole sections are compared at once, and flattened only where needed.
    """
    for key, value in first.items():
        if key in other and other[key] == value:
            continue
        inner = other.get(key)
        if isinstance(value, Mapping) and value and isinstance(inner, Mapping):
            _leave_out(shared, value, inner, f"{prefix}{key}.")
        else:
            for path in flatten({key: value}, prefix):
                shared.pop(path, None)


def varied(results: Sequence[TrialResult]) -> list[Setting]:
    """Return the config paths that the sweep varied, with their values."""
    values: dict[str, dict[str, Any]] = {}
    for result in results:
        for path, value in result.point.items():
            values.setdefault(path, {}).setdefault(setting(value), value)
    defaults = defaults_of(results[0].config)
    return [
        Setting(path, _values(seen), setting(defaults.get(path, defaults.get(f"{path}.name", DASH))))
        for path, seen in values.items()
    ]


def _values(seen: Mapping[str, Any]) -> str:
    """Return the values; for many numbers the range, for many others the first."""
    if len(seen) <= LISTED_VALUES:
        return "; ".join(seen)
    if all(isinstance(value, (int, float)) for value in seen.values()):
        return f"{setting(min(seen.values()))} to {setting(max(seen.values()))}, {len(seen):,} values"
    return f"{'; '.join(list(seen)[:LISTED_VALUES])} and {len(seen) - LISTED_VALUES:,} more"


def machines(results: Sequence[TrialResult]) -> list[tuple[str, str]]:
    """Return the trials' environment: devices, reading of encoders, versions; several values where trials differ."""
    table: dict[str, list[str]] = {}
    for result in results:
        for name, value in {"device": result.device, **_reading(result), **result.versions}.items():
            seen = table.setdefault(name, [])
            if value not in seen:
                seen.append(value)
    return [(name, ", ".join(seen)) for name, seen in table.items()]


def provenance(results: Sequence[TrialResult]) -> list[tuple[str, str]]:
    """Return the provenance for the other side's expert: dates, key, commitment, and hashes of victims and suspects."""
    table: dict[str, list[str]] = {}
    for result in results:
        for name, value in _provenance(result):
            seen = table.setdefault(name, [])
            if value and value not in seen:
                seen.append(value)
    return [(name, _some(seen)) for name, seen in table.items() if seen]


def _provenance(result: TrialResult) -> Iterator[tuple[str, str]]:
    yield "measured", result.date
    if result.key is not None:
        drawn = result.key.admissible
        origin = "chosen by hand" if drawn is None else f"drawn from {drawn:,} keys by {result.key.classes}"
        yield "key", f"{result.key.fingerprint} ({origin})" if result.key.classes else result.key.fingerprint
        insecure = "from victim.seed: insecure, anyone with the config can rebuild the key"
        yield "seed of the key", insecure if result.key.seed_from == "config" else "drawn from the system"
        if result.key.filter is not None:
            yield "samples of the key", filter_text(result.key.filter)
        yield "beacon", result.key.beacon
        stamped = result.key.committed_at
        stamp = f" ({stamped}, {result.key.authority})" if stamped else ""
        yield "commitment", f"{result.key.commitment}{stamp}" if result.key.commitment else "none"
    yield "victim's weights (SHA-256)", result.victim_sha256 or ""
    for rung in result.rungs:
        yield "suspects' weights (SHA-256)", rung.weights_sha256 or ""


def _some(values: Sequence[str]) -> str:
    more = len(values) - MOST_VALUES
    return ", ".join(values[:MOST_VALUES]) + (f" and {more} more" if more > 0 else "")


def _reading(result: TrialResult) -> dict[str, str]:
    """Return how encoders were read as classifiers, without which their accuracy and WSR are meaningless."""
    if result.config.get("victim", {}).get("pretext", {}).get("name", "none") == "none":
        return {}
    verification = result.config["verification"]
    return {"encoders read by": f"{verification['reading']}, {verification['probe_images']} labelled images"}


def filter_text(record: FilterRecord) -> str:
    """Return as text how a key's samples were chosen."""
    return (
        f"{record.chosen:,} chosen of {record.candidates:,}, of which {record.passed:,} passed: known to the victim, "
        f"to {record.thieves} shadow thieves and to none of {record.null_models} null models used only for this choice"
    )
