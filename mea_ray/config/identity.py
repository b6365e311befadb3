"""Names of things made from settings: a hash of the settings that differ from the defaults.

A new option whose default changes nothing does not change any name. When a component, or a group of settings, gives
other results with the same settings, for instance because a default changed, its ``version`` is increased, which
renames everything made with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from mea_ray.config.components import Choice
from mea_ray.core.settings import Settings, Tree, default_of

VERSION = "@version"
"""Key of a version in an identity; no option can have this name."""


def identity(settings: Settings) -> Tree:
    """Return the identity of settings, as plain JSON types.

    Args:
        settings: An experiment, a section of it, a group of settings or a component.

    Returns:
        The settings that differ from their defaults. A component is ``{"name": ..., **what differs}``; a setting whose
        component is the default one with all its defaults is left out. Versions other than 1 are added.
    """
    return _of_choice(settings) if isinstance(settings, Choice) else _of_group(settings)


def digest(tree: Any, length: int = 16) -> str:
    """Return a short, stable hash of a plain tree, used as a name.

    Args:
        tree: JSON types; other values are hashed by their ``str``.
        length: Number of hexadecimal digits, at most 64.
    """
    return hashlib.sha256(_text(tree).encode()).hexdigest()[:length]


def _of_group(settings: Settings, default: Settings | None = None, *, versions: bool = True) -> Tree:
    fields = {
        key: (getattr(settings, key), default_of(field) if default is None else getattr(default, key))
        for key, field in type(settings).model_fields.items()
    }
    tree = _differing(fields, versions=versions)
    return _with_version(tree, type(settings).version if versions else 1)


def _of_choice(choice: Choice, *, versions: bool = True) -> Tree:
    table = choice.components()
    own: dict[str, FieldInfo] = {**type(choice).model_fields, **table.schema(choice.name).model_fields}
    values = {**{key: getattr(choice, key) for key in type(choice).model_fields}, **choice.params}
    fields = {key: (value, default_of(own[key])) for key, value in values.items() if key != "name"}
    tree = {"name": choice.name, **_differing(fields, versions=versions)}
    return _with_version(tree, table.version(choice.name) if versions else 1)


def _differing(fields: Mapping[str, tuple[Any, Any]], *, versions: bool) -> Tree:
    """Return the values that differ from their defaults, of ``{name: (value, default)}``."""
    tree: Tree = {}
    for key, (value, default) in fields.items():
        if _is_group(value) and type(value) is type(default):
            inner = _of_group(value, default, versions=versions)
            if inner:
                tree[key] = inner
            continue
        plain = _plain(value, versions=versions)
        # A default is compared without versions: a version other than 1 keeps the setting in the identity.
        if _text(plain) != _text(_plain(default, versions=False)):
            tree[key] = plain
    return tree


def _is_group(value: Any) -> bool:
    return isinstance(value, Settings) and not isinstance(value, Choice)


def _plain(value: Any, *, versions: bool) -> Any:
    if isinstance(value, Choice):
        return _of_choice(value, versions=versions)
    if isinstance(value, Settings):
        return _of_group(value, versions=versions)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, versions=versions) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, versions=versions) for item in value]
    return to_jsonable_python(value, fallback=str)


def _with_version(tree: Tree, version: int) -> Tree:
    return tree if version == 1 else {**tree, VERSION: version}


def _text(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), default=str)
