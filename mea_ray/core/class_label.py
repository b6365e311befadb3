"""The type of options for a class: its index, or its name in the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from mea_ray.core.words import nearest

MAX_NAMES = 20
"""Maximum number of class names in a message."""


@dataclass(frozen=True)
class ClassOf:
    """Marks an ``int`` in an annotation as the index of a class, for which a config can give the class name.

    A component is always built with indices: an experiment's config replaces names when it is read, so that identities,
    artifacts and results do not depend on which was given.

    Attributes:
        dataset: Option of the component with the dataset of the classes; empty means the experiment's.
    """

    dataset: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept a text beside what the ``int`` accepts."""
        return core_schema.no_info_wrap_validator_function(
            lambda value, index: value if isinstance(value, str) else index(value),
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value),
        )


ClassLabel = Annotated[int, ClassOf()]
"""A class of the experiment's data."""


def marker(field: FieldInfo) -> ClassOf | None:
    """Return the mark of a field for one or several classes; None for other fields."""
    return next((each for each in [*field.metadata, *_inside(field.annotation)] if isinstance(each, ClassOf)), None)


def names_in(value: Any) -> list[str]:
    """Return the class names among the values of a field for classes."""
    return [each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, str)]


def with_indices(value: Any, names: Sequence[str]) -> Any:
    """Replace class names by their indices.

    Args:
        value: An index, a name, or a sequence of these.
        names: The names of the classes, in the order of their indices.

    Raises:
        ValueError: There is no class of a name, and the message names the nearest one and the first of all; or there
            are several of it.
    """
    if isinstance(value, (list, tuple)):
        return tuple(with_indices(each, names) for each in value)
    if not isinstance(value, str):
        return value
    if value not in names:
        more = f", ... ({len(names)} in all)" if len(names) > MAX_NAMES else ""
        known = ", ".join(names[:MAX_NAMES])
        hint = nearest(value, names) or ";"
        raise ValueError(f"the data have no class {value!r}{hint} known: {known}{more}")
    if names.count(value) > 1:
        places = ", ".join(str(place) for place, name in enumerate(names) if name == value)
        raise ValueError(f"the data have {names.count(value)} classes called {value!r}; give an index of {places}")
    return names.index(value)


def _inside(annotation: Any) -> Iterator[Any]:
    """Yield what annotates the parts of an annotation, at any depth."""
    for each in get_args(annotation):
        yield from getattr(each, "__metadata__", ())
        yield from _inside(each)
