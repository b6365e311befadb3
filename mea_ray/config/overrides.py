"""Plain trees of settings: read from YAML, overridden by ``key.path=value``, merged, and named by what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Tree


def load_tree(path: str | Path) -> Tree:
    """Read a YAML file into a plain tree.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {str(path)!r}: {error.strerror}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of config keys, got {type(tree).__name__}")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``key.path=value``; the value is read as YAML.

    Raises:
        ConfigError: There is no ``=`` or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} must read key.path=value, e.g. thief.budgets=[100,500]")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from None


def set_path(tree: Tree, key: str, value: Any) -> Tree:
    """Return a copy of ``tree`` with the config path ``key`` set.

    Setting ``x.name`` to another component drops the parameters of the one before; setting a path below a component
    given by its bare name (``data: digits``) keeps the name. A ``name`` at the top is a title: all else stays.
    """
    return _set(tree, key, value, component=False)


def _set(tree: Tree, key: str, value: Any, *, component: bool) -> Tree:
    head, _, rest = key.partition(".")
    tree = dict(tree)
    if not rest:
        if component and head == "name" and tree.get("name") not in {None, value}:
            tree = {}
        tree[head] = value
        return tree
    inner = tree.get(head)
    if isinstance(inner, str):
        inner = {"name": inner}
    if inner is None:
        inner = {}
    if not isinstance(inner, Mapping):
        raise ConfigError(f"cannot set {key!r}: {head!r} holds {inner!r}, which has no keys below it")
    tree[head] = _set(dict(inner), rest, value, component=True)
    return tree


def merge(tree: Tree, settings: Mapping[str, Any]) -> Tree:
    """Set several config paths; those that choose a component (``x.name``, ``x``) go first."""
    for key in sorted(settings, key=lambda k: (not k.endswith("name") and k.count(".") > 0, k.count("."))):
        tree = set_path(tree, key, settings[key])
    return tree


def let_go(tree: Tree, settings: Mapping[str, Any]) -> list[str]:
    """Say, as ``path=value``, what a file's components have that settings of another ``x.name`` drop and do not set.

    What a file says of a component (the size of a dataset's images) is easily thought to hold for the next, too.
    """
    lost = []
    for key, name in settings.items():
        parent, dot, last = key.rpartition(".")
        had: Any = tree
        for part in parent.split("."):
            had = had.get(part) if isinstance(had, Mapping) else None
        if dot and last == "name" and isinstance(had, Mapping) and had.get("name") not in {None, name}:
            paths = {f"{parent}.{own}": value for own, value in had.items() if own != "name"}
            lost += [f"{path}={value}" for path, value in paths.items() if path not in settings]
    return lost
