"""Writes `tests/config/golden_defaults.json` anew: `python tests/helpers/defaults.py`.

Names are made of what differs from the defaults, and of versions. A default that changes without a version that rises
would give two different things the same name. Writing the file is refused as long as one has.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from mea_ray.cli.catalogue import TABLES
from mea_ray.config import ExperimentConfig, identity
from mea_ray.config.components import Choice
from mea_ray.core.settings import Settings, default_of

FILE = Path(__file__).parents[1] / "config" / "golden_defaults.json"
UNNAMED = {"resources", "tracking", "storage"}
"""Sections of an experiment that say where it runs; no name is made of them."""
Golden = dict[str, dict[str, Any]]


def current() -> Golden:
    """Return for the config and for each component its version, its defaults by path, and its groups' versions."""
    result = {"config": _entry(1, dict(ExperimentConfig.model_fields), skip=UNNAMED)}
    for kind, where in TABLES.items():
        if kind == "benchmarks":
            continue
        module, _, attribute = where.partition(":")
        table = getattr(importlib.import_module(module), attribute)
        for name in table.entries:
            result[f"{kind}/{name}"] = _entry(table.version(name), dict(table.schema(name).model_fields))
    return result


def _entry(version: int, fields: dict[str, Any], skip: Set[str] = frozenset()) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    groups: dict[str, int] = {}
    for path, value, group in _leaves({key: default_of(field) for key, field in fields.items() if key not in skip}):
        if group:
            groups[path] = value
        else:
            defaults[path] = to_jsonable_python(value)
    return {"version": version, "defaults": defaults, "groups": groups}


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield path and value of every default, and path and version of every group."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Choice):
            yield path, identity(value), False
        elif isinstance(value, Settings):
            yield path, type(value).version, True
            yield from _leaves({name: getattr(value, name) for name in type(value).model_fields}, f"{path}.")
        else:
            yield path, value, False


def silently_changed(before: Golden, now: Golden) -> list[str]:
    """List the defaults that changed though neither their component's nor a group's version rose.

    Args:
        before: What the file says.
        now: What the code says.
    """
    collected = []
    for owner, old in before.items():
        new = now.get(owner)
        if new is None or new["version"] > old["version"]:
            continue
        for path, value in old["defaults"].items():
            if path not in new["defaults"] or new["defaults"][path] == value:
                continue
            parts = path.split(".")
            above = [".".join(parts[:count]) for count in range(1, len(parts))]
            if not any(new["groups"].get(group, 1) > old["groups"].get(group, 1) for group in above):
                collected.append(f"{owner}: {path} was {value!r} and is {new['defaults'][path]!r}")
    return collected


if __name__ == "__main__":
    now = current()
    if FILE.exists() and (changed := silently_changed(json.loads(FILE.read_text(encoding="utf-8")), now)):
        sys.exit("raise the version of these first:\n" + "\n".join(changed))
    FILE.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {FILE}\n")
