"""Groups of settings: frozen pydantic models that sections of a config and options of components are made of.

A component takes a group as one keyword-only parameter, for example ``carrier: Carrier = Carrier()``. A config sets
``carrier: {rho: 0.3}``, the command line ``victim.watermark.carrier.rho=0.3``, and ``mea-ray list`` shows
``carrier.rho``. Each field is documented by its ``Field(description=...)`` or under ``Attributes:`` of the class.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from mea_ray.core.words import nearest

Tree = dict[str, Any]
"""Settings as plain JSON types: ``{name: value or tree}``."""


@dataclass(frozen=True)
class Parameter:
    """One setting, as it is listed.

    Attributes:
        name: Its path, dotted where it lies in a group, e.g. ``carrier.rho``.
        type: Its type, as a user would write it.
        default: Its default.
        doc: What it means.
        range: Its bounds, e.g. ``in (0, 0.5)`` or ``>= 1``; empty if it has none.
    """

    name: str
    type: str
    default: Any
    doc: str
    range: str = ""


class Settings(BaseModel):
    """Base of every group of settings: frozen, unknown keys refused, defaults checked, NaN and infinity refused.

    A mapping given for a group that has a default changes that default: keys that are left out keep its values.

    Attributes:
        version: Part of the names of all that was made with these settings when it is not 1. Raise it when the same
            settings give other results, for instance when a default changes.
        renamed: Old option names to the paths that replace them, both relative to this group. An old name is accepted
            with a warning for one version.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )
    version: ClassVar[int] = 1
    renamed: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = with_current_names(value, cls.renamed, cls.__name__)
        return {
            key: over_default(cls.model_fields[key], item) if key in cls.model_fields else item
            for key, item in given.items()
        }

    def over(self, given: Mapping[str, Any]) -> Tree:
        """Return ``given``, completed with these settings."""
        mine = {name: getattr(self, name) for name in type(self).model_fields}
        return {**mine, **{key: _over(mine.get(key), item) for key, item in given.items()}}

    @classmethod
    def parameters(cls, prefix: str = "", default: Settings | None = None, doc: str = "") -> Iterator[Parameter]:
        """List every setting of this group, those of groups inside of it by dotted paths.

        Args:
            prefix: Put before each path.
            default: A group with the defaults to show; those of the class when None.
            doc: What the group means where it is used, for a group that is listed as a single row.
        """
        docs = documented_arguments(cls.__doc__)
        for name, field in cls.model_fields.items():
            value = getattr(default, name) if default is not None else default_of(field)
            meaning = field.description or docs.get(name, "")
            yield from parameters_of(f"{prefix}{name}", field, value, meaning)

    def resolved(self) -> Tree:
        """Return the whole tree as plain JSON types, defaults filled in."""
        return self.model_dump(mode="json")


def default_of(field: FieldInfo) -> Any:
    """Return the default of a field; ``PydanticUndefined`` if it is required."""
    return field.get_default(call_default_factory=True, validated_data={})


def group_of(annotation: Any) -> type[Settings] | None:
    """Return the group of settings that an annotation holds: ``Carrier``, ``Carrier | None``; None if there is none."""
    union = get_origin(annotation) in {Union, UnionType}
    kinds: tuple[Any, ...] = get_args(annotation) if union else (annotation,)
    groups: list[type[Settings]] = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
    return groups[0] if groups else None


def parameters_of(path: str, field: FieldInfo, default: Any, doc: str) -> Iterator[Parameter]:
    """List one field: itself, or all that the group in it holds."""
    group = group_of(field.annotation)
    if group is None:
        yield Parameter(path, type_text(field.annotation), default, doc, range_text(field))
        return
    whole = field.annotation is group
    if not whole:
        others = [kind for kind in get_args(field.annotation) if kind is not group]
        text = " | ".join([*map(type_text, others), "group"])
        yield Parameter(path, text, None if isinstance(default, Settings) else default, doc)
    yield from group.parameters(f"{path}.", default if isinstance(default, group) else None, doc)


def over_default(field: FieldInfo, given: Any) -> Any:
    """Return what was given for a field, completed with its default if both are groups of settings."""
    return _over(default_of(field), given) if isinstance(given, Mapping) else given


def _over(default: Any, given: Any) -> Any:
    return default.over(given) if isinstance(default, Settings) and isinstance(given, Mapping) else given


def with_current_names(given: Mapping[str, Any], renamed: Mapping[str, str], owner: str) -> Tree:
    """Move values that are given under old names to where they belong today, with a warning for each.

    Args:
        given: Settings as they were written.
        renamed: Old name to the path that replaces it.
        owner: Whose settings they are, for the warning.
    """
    tree = dict(given)
    for old, path in renamed.items():
        if old in tree:
            warnings.warn(
                f"{owner}: {old!r} is now {path!r}; write {path}={tree[old]!r}, the old name is removed in the next "
                "version",
                FutureWarning,
                stacklevel=2,
            )
            tree = _placed(tree, path, tree.pop(old))
    return tree


def _placed(tree: Tree, path: str, value: Any) -> Tree:
    head, _, rest = path.partition(".")
    if not rest:
        return {**tree, head: value}
    inner = tree.get(head)
    if isinstance(inner, Settings):
        inner = {name: getattr(inner, name) for name in type(inner).model_fields}
    return {**tree, head: _placed(dict(inner) if isinstance(inner, Mapping) else {}, rest, value)}


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Word every problem of a validation, one line each: the path, the value, the constraint, the nearest known key."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys(model, problem["loc"][:-1])
            hint = nearest(str(problem["loc"][-1]), known)
            lines.append(f"{path}: unknown key{hint} Known: {', '.join(known)}")
        else:
            lines.append(f"{path}={problem['input']!r}: {problem['msg']}")
    return lines


def _keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the group at ``location`` below ``model``."""
    current: type[BaseModel] | None = model
    for part in location:
        field = current.model_fields.get(str(part)) if current is not None else None
        current = group_of(field.annotation) if field is not None else None
    return list(current.model_fields) if current is not None else []


def documented_arguments(docstring: str | None) -> dict[str, str]:
    """Read the ``Args:`` or ``Attributes:`` section of a Google-style docstring into ``{name: text on one line}``."""
    # cleandoc puts section names at the margin, so the section ends at the next line that starts there.
    match = re.search(
        r"^(?:Args|Attributes):[ \t]*\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(docstring or "") + "\n", re.MULTILINE
    )
    if not match:
        return {}
    block = match[1].rstrip().splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in block if line.strip())
    arguments: dict[str, str] = {}
    name = ""
    for line in block:
        text = line.strip()
        if line.strip() and len(line) - len(line.lstrip()) < indent + 1:
            name, _, text = text.partition(":")
            name = name.split(" ")[0].lstrip("*")
            arguments[name] = text.strip()
        elif name and text:
            arguments[name] = f"{arguments[name]} {text}".strip()
    return arguments


def type_text(kind: Any) -> str:
    """Return an annotation as a user would write it, e.g. ``float | null`` or ``list of int``."""
    if kind is None or kind is type(None):
        return "null"
    origin, inside = get_origin(kind), get_args(kind)
    if origin is None:
        return getattr(kind, "__name__", str(kind))
    if origin is Annotated:
        return type_text(inside[0])
    if origin in {Union, UnionType}:
        return " | ".join(map(type_text, inside))
    if origin in {tuple, list}:
        return f"list of {', '.join(dict.fromkeys(type_text(each) for each in inside if each is not Ellipsis))}"
    if isinstance(origin, type):
        return f"{origin.__name__.lower()} of {', '.join(map(type_text, inside))}"
    return " | ".join(map(str, inside))  # a Literal


def range_text(field: FieldInfo) -> str:
    """Return the bounds of a field: ``in [0, 1)``, ``> 0``; empty if it has none."""
    bounds = {type(bound): bound for bound in _metadata(field)}
    low = bounds.get(annotated_types.Ge) or bounds.get(annotated_types.Gt)
    high = bounds.get(annotated_types.Le) or bounds.get(annotated_types.Lt)
    below = getattr(low, "ge", getattr(low, "gt", None))
    above = getattr(high, "le", getattr(high, "lt", None))
    closed_below, closed_above = isinstance(low, annotated_types.Ge), isinstance(high, annotated_types.Le)
    if low is not None and high is not None:
        return f"in {'[' if closed_below else '('}{below}, {above}{']' if closed_above else ')'}"
    if low is not None:
        return f"{'>=' if closed_below else '>'} {below}"
    return "" if high is None else f"{'<=' if closed_above else '<'} {above}"


def _metadata(field: FieldInfo) -> list[Any]:
    """Collect the constraints of a field, also those of ``Annotated[float, ...] | None``."""
    found = list(field.metadata)
    for kind in get_args(field.annotation):
        if get_origin(kind) is Annotated:
            for item in get_args(kind)[1:]:
                found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found
