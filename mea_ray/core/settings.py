"""Groups of settings: frozen pydantic models for sections of a config and options of components.

A component takes a group as one keyword-only parameter, for example ``carrier: Carrier = Carrier()``. A config sets
``carrier: {rho: 0.3}``, the command line ``victim.watermark.carrier.rho=0.3``, and ``mea-ray list`` shows
``carrier.rho``. Each field is documented by its ``Field(description=...)`` or under ``Attributes:`` of the class.
"""

from __future__ import annotations

import inspect
import re
import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from mea_ray.core.class_label import marker
from mea_ray.core.errors import ConfigError, RenamedOption
from mea_ray.core.words import nearest_and_known

if TYPE_CHECKING:
    from typing_extensions import Self

Tree = dict[str, Any]
"""Settings as plain JSON types: ``{name: value or tree}``."""


@dataclass(frozen=True)
class Parameter:
    """One setting, as listed.

    Attributes:
        name: Its path, dotted where it is in a group, e.g. ``carrier.rho``.
        type: Its type, as text for users.
        default: Its default.
        doc: Its meaning.
        range: Its bounds, e.g. ``in (0, 0.5)`` or ``>= 1``; empty if it has none.
    """

    name: str
    type: str
    default: Any
    doc: str
    range: str = ""


class Settings(BaseModel):
    """Base of every group of settings: frozen, defaults checked, unknown keys, NaN and infinity rejected.

    A mapping for a group with a default changes that default: omitted keys keep its values. A text for a group with a
    ``name`` is that name. A single value for a list is a list of one.

    Attributes:
        version: Part of the names of everything made with these settings if it is not 1. Increase it when the same
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
        for key, item in given.items():
            if key in cls.model_fields and _is_truth_for_number(cls.model_fields[key].annotation, item):
                issue = SettingProblem(str(key), "a number is needed, not true or false", printable(item))
                raise RefusedSettings(InvalidSettings("", [issue]))
        return {
            key: _completed(cls.model_fields[key], item) if key in cls.model_fields else item
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

    def changed(self, **changes: Any) -> Self:
        """Return these settings with some of them replaced, checked again.

        Raises:
            InvalidSettings: A setting is unknown, or a value is out of its range.
        """
        if not changes:
            return self
        try:
            return type(self).model_validate({**dict(self), **changes})
        except ValidationError as error:
            raise InvalidSettings("", problems(error, type(self))) from None

    @classmethod
    def part_of(cls, whole: Settings) -> Self:
        """Return these settings alone, out of those of a class that inherits them."""
        return cls(**{name: getattr(whole, name) for name in cls.model_fields})

    def resolved(self) -> Tree:
        """Return the whole tree as plain JSON types, defaults filled in."""
        return self.model_dump(mode="json")


def default_of(field: FieldInfo) -> Any:
    """Return the default of a field; ``PydanticUndefined`` if it is required."""
    return field.get_default(call_default_factory=True, validated_data={})


def group_of(annotation: Any) -> type[Settings] | None:
    """Return the group of settings that an annotation holds: ``Carrier``, ``Carrier | None``; None if there is none."""
    # In Python 3.10 tuple[int, ...] is an instance of type, too, and no class.
    kinds = [kind for kind in members(annotation) if isinstance(kind, type) and get_origin(kind) is None]
    groups: list[type[Settings]] = [kind for kind in kinds if issubclass(kind, Settings)]
    return groups[0] if groups else None


def parameters_of(path: str, field: FieldInfo, default: Any, doc: str) -> Iterator[Parameter]:
    """List one field: itself, or all that the group in it holds."""
    group = group_of(field.annotation)
    if group is None:
        yield Parameter(path, _field_text(field), default, doc, range_text(field))
        return
    whole = field.annotation is group
    if not whole:
        others = [kind for kind in get_args(field.annotation) if kind is not group]
        text = " | ".join([*map(type_text, others), "group"])
        yield Parameter(path, text, None if isinstance(default, Settings) else default, doc)
    yield from group.parameters(f"{path}.", default if isinstance(default, group) else None, doc)


def members(annotation: Any) -> list[Any]:
    """Return the members of a union; of anything else itself."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) not in {Union, UnionType}:
        return [annotation]
    return [inner for each in get_args(annotation) for inner in members(each)]


def is_list(annotation: Any) -> bool:
    """Say whether an annotation stands for a list and nothing else, null aside."""
    kinds = [kind for kind in members(annotation) if kind is not type(None)]
    return bool(kinds) and all(get_origin(kind) in {tuple, list} for kind in kinds)


def _is_truth_for_number(annotation: Any, value: Any) -> bool:
    """Whether true or false was given where only numbers are meant: Python, and pydantic with it, takes true for 1."""
    if isinstance(value, bool):
        kinds = set(_leaves(annotation))
        return bool(kinds & {int, float}) and kinds <= {int, float, type(None)}
    if isinstance(value, Mapping):
        return any(_is_truth_for_number(annotation, each) for each in value.values())
    return isinstance(value, (list, tuple)) and any(_is_truth_for_number(annotation, each) for each in value)


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the plain types that an annotation is made of: of a list its items', of a mapping its values'."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from map(type, inside)
    elif origin is Annotated:
        yield from _leaves(inside[0])
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield from _leaves(inside[1])
    elif inside:
        for each in inside:
            yield from () if each is Ellipsis else _leaves(each)
    else:
        yield annotation


def _completed(field: FieldInfo, given: Any) -> Any:
    """Return what was given for a field in the form that the field has."""
    if given is not None and not isinstance(given, (list, tuple)) and is_list(field.annotation):
        return [given]
    group = group_of(field.annotation)
    if isinstance(given, str) and group is not None and "name" in group.model_fields:
        return {"name": given} if {*members(field.annotation)} <= {group, type(None)} else given
    return _over(default_of(field), given)


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
            warn_renamed(owner, old, path, f"{path}={printable(tree[old])}")
            tree = _placed(tree, path, tree.pop(old))
    return tree


def warn_renamed(owner: str, old: str, new: str, write: str) -> None:
    """Warn that something is written under an old name.

    Args:
        owner: Whose setting it is.
        old: The old name.
        new: The name that replaces it.
        write: The setting as it is written today.
    """
    text = f"{owner}: {old!r} is now {new!r}; write {write}, the old name is removed in the next version"
    warnings.warn(text, RenamedOption, stacklevel=3)


def _placed(tree: Tree, path: str, value: Any) -> Tree:
    head, _, rest = path.partition(".")
    if not rest:
        return {**tree, head: value}
    inner = tree.get(head)
    if isinstance(inner, Settings):
        inner = {name: getattr(inner, name) for name in type(inner).model_fields}
    return {**tree, head: _placed(dict(inner) if isinstance(inner, Mapping) else {}, rest, value)}


@dataclass(frozen=True)
class SettingProblem:
    """A problem of one setting.

    Attributes:
        path: Its path; empty for the settings as a whole.
        text: The problem and the remedy.
        value: Its value, shortened for a message; None if its path is wrong.
    """

    path: str
    text: str
    value: str | None = None

    def __str__(self) -> str:
        if not self.path:
            return self.text
        return f"{self.path}: {self.text}" if self.value is None else f"{self.path}={self.value}: {self.text}"

    def below(self, path: str) -> SettingProblem:
        """Return the same problem of a group at ``path``."""
        return SettingProblem(".".join(part for part in (path, self.path) if part), self.text, self.value)


class InvalidSettings(ConfigError):
    """Invalid settings, with all problems.

    Args:
        owner: Owner of the settings, e.g. ``attack 'knockoff'``; empty for a config.
        problems: The problems.
    """

    def __init__(self, owner: str, problems: Sequence[SettingProblem]) -> None:
        super().__init__(owner, tuple(problems))
        self.owner, self.problems = owner, tuple(problems)

    def __str__(self) -> str:
        if not self.owner:
            return "\n".join(map(str, self.problems))
        return "; ".join(
            each.text if each.text.startswith(self.owner) else f"{self.owner}: {each}" for each in self.problems
        )


class RefusedSettings(ValueError):
    """Carries a ``ConfigError`` out of a validator of pydantic, so that other problems are reported with it."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))
        self.error = error


def problems(error: ValidationError, model: type[BaseModel]) -> list[SettingProblem]:
    """Return every problem of a validation: the path, the value, the constraint, the nearest known key."""
    issues = []
    errors = error.errors()
    wrong_items = {each["loc"][:-1] for each in errors if each["loc"]}
    missing: dict[str, tuple[int, Any]] = {}
    for each in errors:
        if each["type"] == "too_short" and each["loc"] in wrong_items:
            continue  # it is counted without the items that are wrong themselves
        if each["type"] == "missing" and isinstance(each["loc"][-1], int):
            missing[".".join(map(str, each["loc"][:-1]))] = (each["loc"][-1] + 1, each["input"])
            continue
        path = ".".join(map(str, each["loc"]))
        cause = each.get("ctx", {}).get("error")
        if isinstance(cause, RefusedSettings):
            inner = cause.error
            issues += (
                [problem.below(path) for problem in inner.problems]
                if isinstance(inner, InvalidSettings)
                else [SettingProblem(path, str(inner))]
            )
        elif each["type"] == "extra_forbidden":
            known = _keys(model, each["loc"][:-1])
            issues.append(SettingProblem(path, f"unknown key{nearest_and_known(str(each['loc'][-1]), known)}"))
        else:
            issues.append(SettingProblem(path, each["msg"].removeprefix("Value error, "), printable(each["input"])))
    issues += [
        SettingProblem(path, f"give {number} values", printable(value)) for path, (number, value) in missing.items()
    ]
    return issues


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 80, 80
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 8


def printable(value: Any, length: int = 80) -> str:
    """Return a value as text of one line, shortened to ``length`` characters."""
    text = _BRIEF.repr(value.resolved() if isinstance(value, Settings) else value)
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


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
    """Return an annotation as text for users, e.g. ``float | null`` or ``list of int``."""
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


def _field_text(field: FieldInfo) -> str:
    """Return the type of a field as a user would write it; ``class`` stands for an index or a name."""
    text = type_text(field.annotation)
    return text if marker(field) is None else text.replace("int", "class")


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
    metadata = list(field.metadata)
    for kind in get_args(field.annotation):
        if get_origin(kind) is Annotated:
            for item in get_args(kind)[1:]:
                metadata += item.metadata if isinstance(item, FieldInfo) else [item]
    return metadata
