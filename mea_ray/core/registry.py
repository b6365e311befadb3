"""Tables of named components: lazy, picklable by name, with parameters that can be listed and checked.

A table maps a name to ``"module:attribute"``. The attribute is a class or a function. Its *positional* parameters are
supplied by the program when it is built (an image shape, a number of classes); its *keyword-only* parameters, all with
defaults, are what a config may set. Nothing is imported before a name is used.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from mea_ray.core.errors import ConfigError


@dataclass(frozen=True)
class Parameter:
    """One parameter that a config may set: its name, type as text, default, and one-line documentation."""

    name: str
    type: str
    default: Any
    doc: str


def nearest(word: str, words: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``words``, or an empty string."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def documented_arguments(docstring: str | None) -> dict[str, str]:
    """Read the ``Args:`` section of a Google-style docstring into ``{name: text on one line}``."""
    # cleandoc puts section names at the margin, so the section ends at the next line that starts there.
    match = re.search(r"^Args:[ \t]*\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(docstring or "") + "\n", re.MULTILINE)
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


class Table:
    """A table of components of one kind.

    Args:
        kind: What the components are, for messages, e.g. ``"attack"``.
        entries: ``{name: "module:attribute"}``.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self.entries = dict(entries)
        self._schemas: dict[str, type[BaseModel]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.kind, self.entries)  # the schemas are classes without a module; they are made again

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self.entries)

    def resolve(self, name: str) -> Callable[..., Any]:
        """Import and return the component called ``name``.

        Raises:
            ConfigError: There is no such name; the message gives the nearest one and the list.
        """
        if name not in self.entries:
            names = self.names()
            raise ConfigError(f"unknown {self.kind} {name!r}{nearest(str(name), names)} Known: {', '.join(names)}")
        module, _, attribute = self.entries[name].partition(":")
        component: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return component

    def parameters(self, name: str) -> list[Parameter]:
        """List what a config may set for ``name``."""
        component = self.resolve(name)
        docs = documented_arguments(component.__doc__)
        if inspect.isclass(component):
            docs = {**documented_arguments(component.__init__.__doc__), **docs}
        return [
            Parameter(p.name, inspect.formatannotation(p.annotation).strip("'\""), p.default, docs.get(p.name, ""))
            for p in inspect.signature(component).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]

    def check(self, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Check parameters against the component's signature and fill in its defaults.

        Returns:
            Every parameter of the component with its value, converted to the annotated type.

        Raises:
            ConfigError: A parameter is unknown (with the nearest known one) or has a value of the wrong type.
        """
        schema = self._schema(name)
        known = list(schema.model_fields)
        for key in params:
            if key not in known:
                hint = f"{nearest(key, known)} Known: {', '.join(known) or 'none'}"
                raise ConfigError(f"{self.kind} {name!r} has no parameter {key!r}{hint}")
        try:
            checked = schema(**params)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
            raise ConfigError(f"{self.kind} {name!r}: " + "; ".join(lines)) from None
        return {key: getattr(checked, key) for key in known}

    def build(self, name: str, *args: Any, **params: Any) -> Any:
        """Build the component: ``args`` from the program, ``params`` from a config, checked first."""
        return self.resolve(name)(*args, **self.check(name, params))

    def _schema(self, name: str) -> type[BaseModel]:
        if name not in self._schemas:
            component = self.resolve(name)
            target = component.__init__ if inspect.isclass(component) else component
            hints = get_type_hints(target)
            fields: dict[str, Any] = {
                p.name: (hints.get(p.name, Any), Field(default=p.default))
                for p in inspect.signature(component).parameters.values()
                if p.kind is p.KEYWORD_ONLY
            }
            config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
            self._schemas[name] = create_model(f"{self.kind}_{name}", __config__=config, **fields)
        return self._schemas[name]
