"""Config paths: listing, lookup, and suggestions for unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from mea_ray.config.components import Choice
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Settings, default_of, group_of

MAX_SUGGESTIONS = 4


def field_at(model: type[Settings], tree: Any, path: str) -> FieldInfo | None:
    """Return the field at a config path.

    Args:
        model: The group at which the path starts.
        tree: The current settings, for the chosen components.
        path: Dotted path, below components too.

    Returns:
        The field; None if there is none, or if it is in a mapping with arbitrary keys.
    """
    head, _, rest = path.partition(".")
    field = model.model_fields.get(head)
    if field is None or not rest:
        return field
    inner = tree.get(head) if isinstance(tree, Mapping) else None
    group = group_of(field.annotation)
    if group is not None and issubclass(group, Choice):
        group = _options(group, _chosen(inner, field)) if rest != "name" else group
    return None if group is None else field_at(group, inner, rest)


def paths(model: type[Settings], tree: Any, prefix: str = "") -> Iterator[str]:
    """Yield every config path below a group, with the options of the components that are chosen.

    Args:
        model: The group.
        tree: The current settings.
        prefix: Prefix of each path.
    """
    for name, field in model.model_fields.items():
        inner = tree.get(name) if isinstance(tree, Mapping) else None
        group = group_of(field.annotation)
        if group is None:
            yield f"{prefix}{name}"
        elif issubclass(group, Choice):
            yield f"{prefix}{name}.name"
            options = _options(group, _chosen(inner, field))
            if options is not None:
                yield from paths(options, inner, f"{prefix}{name}.")
        else:
            yield from paths(group, inner, f"{prefix}{name}.")


def meant(path: str, known: list[str]) -> str:
    """Return ``"; did you mean 'a.b', 'c.b'?"`` for the paths that an unknown one may stand for.

    These are the paths with the same last name, or whose last name it abbreviates (``lr``); if there are none, those of
    the siblings with the most similar name; else the most similar of all.
    """
    parent, _, last = path.rpartition(".")
    known = list(dict.fromkeys(name for each in known for name in (each.removesuffix(".name"), each)))
    depth = path.count(".") + 1
    beside = {".".join(each.split(".")[:depth]) for each in known if not parent or each.startswith(f"{parent}.")}
    same = [each for each in known if each == path or last in _called(each)]
    if parent:
        same = [each for each in same if each in beside] or same
        same = difflib.get_close_matches(path, same, n=1, cutoff=0.8) or same
    if not same:
        siblings = {each.rpartition(".")[2]: each for each in sorted(beside)}
        same = [siblings[each] for each in difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)]
    if not same and not (parent and beside):
        by_last: dict[str, list[str]] = {}
        for each in known:
            by_last.setdefault(each.rpartition(".")[2], []).append(each)
        close = difflib.get_close_matches(last, by_last, n=1)
        same = difflib.get_close_matches(path, known, n=1, cutoff=0.6) or [each for by in close for each in by_last[by]]
    if not same:
        return ""
    more = ", ..." if len(same) > MAX_SUGGESTIONS else ""
    return f"; did you mean {', '.join(repr(each) for each in same[:MAX_SUGGESTIONS])}{more}?"


def _called(path: str) -> set[str]:
    """Return what people call a path: its last name, and the first letters of that name's words."""
    last = path.rpartition(".")[2]
    words = last.split("_")
    return {last, "".join(word[:1] for word in words)} if len(words) > 1 else {last}


def _chosen(inner: Any, field: FieldInfo) -> str | None:
    """Return the name of the component that is chosen for a field."""
    name = inner.get("name") if isinstance(inner, Mapping) else inner
    if isinstance(name, str):
        return name
    default = default_of(field)
    return default.name if isinstance(default, Choice) else None


def _options(choice: type[Choice], name: str | None) -> type[Settings] | None:
    """Return the options of a component; None if it cannot be found."""
    if name is None:
        return None
    try:
        return choice.components().schema(name)
    except ConfigError:
        return None
