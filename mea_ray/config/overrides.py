"""Plain trees of settings, and overrides ``key.path=value``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from mea_ray.config import yaml_text
from mea_ray.config.paths import field_at
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Settings, Tree, members, printable

_NULL = {"", "null", "Null", "NULL", "~"}


def load_tree(path: str | Path) -> Tree:
    """Read a YAML file into a plain tree.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not hold a mapping.
    """
    tree = yaml_text.read(path)
    if tree is None:
        raise ConfigError(f"{path} is empty; write config keys into it, e.g. `data: digits`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of config keys, got {printable(tree)}")
    return tree


def split_override(text: str) -> tuple[str, str]:
    """Split ``key.path=value``.

    Raises:
        ConfigError: There is no ``=``, or the path has an empty part.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {printable(text)} must read key.path=value, e.g. thief.budgets=[100,500]")
    return key, value


def overridden(model: type[Settings], tree: Tree, overrides: Sequence[tuple[str, str]]) -> tuple[Tree, Tree]:
    """Set config paths to typed values; those that choose a component go first.

    Args:
        model: The schema of the tree, which determines how a value is parsed (see ``typed``).
        tree: The current settings.
        overrides: Pairs of path and text.

    Returns:
        A new tree, and the values by path.

    Raises:
        ConfigError: A value is not YAML, a path leads below a plain value, or a path is given two values.
    """
    refuse_twice(overrides)
    values: Tree = {}
    for key, text in sorted(dict(overrides).items(), key=lambda pair: _order(pair[0])):
        values[key] = typed(field_at(model, tree, key), text, f"override {printable(f'{key}={text}')}")
        tree = set_path(tree, key, values[key])
    return tree, values


def refuse_twice(overrides: Sequence[tuple[str, str]]) -> None:
    """Reject two values for one path, which are ambiguous.

    Raises:
        ConfigError: A path is given two different values.
    """
    given: dict[str, str] = {}
    for key, text in overrides:
        first = given.setdefault(key, text)
        if first != text:
            raise ConfigError(
                f"{key} is overridden twice, by {printable(first)} and by {printable(text)}; remove one of them"
            )


def typed(field: FieldInfo | None, text: str, where: str) -> Any:
    """Parse a value from the command line according to the type of its setting.

    Text is taken literally: ``name=1e3``, ``storage=007`` and ``name=on`` are text. Everything else is YAML. The
    items of a list may be separated by commas, without brackets.

    Args:
        field: The setting; None if it is not known.
        text: The typed text.
        where: Description, for messages.

    Raises:
        ConfigError: It is no YAML.
    """
    kinds = members(field.annotation) if field is not None else []
    if type(None) in kinds and text.strip() in _NULL:
        return None
    scalars = {kind for kind in map(_scalar, kinds) if kind is not type(None)}
    lists = [kind for kind in kinds if get_origin(kind) in {tuple, list}]
    only_text = scalars == {str}
    if only_text and not lists:
        return _as_typed(text)
    value = yaml_text.parse(text, where, only_text=only_text)
    if lists and isinstance(value, str) and "," in value and not text.lstrip().startswith(("'", '"')):
        return [yaml_text.parse(part, where, only_text=only_text) for part in value.split(",")]
    return value


def _scalar(kind: Any) -> Any:
    """Return what a type is made of: of a list its items' type, of words ``str``."""
    if get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)):
        return str
    if get_origin(kind) in {tuple, list}:
        items = {_scalar(each) for item in get_args(kind) if item is not Ellipsis for each in members(item)}
        return items.pop() if len(items) == 1 else object
    return kind


def _as_typed(text: str) -> str:
    """Return literal text, without surrounding quotes."""
    try:
        value = yaml_text.parse(text, "text", only_text=True)
    except ConfigError:
        value = None
    quoted = text.strip()[:1] in {"'", '"'} and isinstance(value, str)
    return str(value) if quoted else text.strip()


def set_path(tree: Tree, key: str, value: Any) -> Tree:
    """Return a copy of ``tree`` with the config path ``key`` set.

    Setting ``x.name`` to another component drops the parameters of the previous one. Setting a path below a component
    that is given by its bare name (``data: digits``) keeps the name. A ``name`` at the top is a title: all else stays.

    Raises:
        ConfigError: The path leads below a plain value.
    """
    return _set(tree, key, value, component=False)


def _set(tree: Tree, key: str, value: Any, *, component: bool) -> Tree:
    head, _, rest = key.partition(".")
    tree = dict(tree)
    if not rest:
        if component and head == "name" and tree.get("name") not in (None, value):
            tree = {}
        tree[head] = value
        return tree
    inner = tree.get(head)
    if isinstance(inner, str):
        inner = {"name": inner}
    if inner is None:
        inner = {}
    if not isinstance(inner, Mapping):
        raise ConfigError(f"cannot set {key!r}: {head!r} is {printable(inner)}, which has no keys below it")
    tree[head] = _set(dict(inner), rest, value, component=True)
    return tree


def merge(tree: Tree, settings: Mapping[str, Any]) -> Tree:
    """Set several config paths; those that choose a component (``x.name``, ``x``) go first."""
    for key in sorted(settings, key=_order):
        tree = set_path(tree, key, settings[key])
    return tree


def _order(key: str) -> tuple[bool, int]:
    return not (key == "name" or key.endswith(".name")) and "." in key, key.count(".")


def dropped(tree: Tree, settings: Mapping[str, Any]) -> list[str]:
    """List, as ``path=value``, the options in a file that settings of another ``x.name`` drop and do not set again.

    Users easily expect an option of one component in a file (e.g. a dataset's image size) to apply to the next one,
    too.
    """
    lost = []
    for key, name in settings.items():
        parent, dot, last = key.rpartition(".")
        had: Any = tree
        for part in parent.split("."):
            had = had.get(part) if isinstance(had, Mapping) else None
        if dot and last == "name" and isinstance(had, Mapping) and had.get("name") not in (None, name):
            options = {f"{parent}.{own}": value for own, value in had.items() if own != "name"}
            lost += [f"{path}={printable(value)}" for path, value in options.items() if path not in settings]
    return lost
