"""Tables of named components: lazy, picklable by name, with parameters that can be listed and checked.

A table maps a name to ``"module:attribute"``. The attribute is a class or a function. Its *positional* parameters are
supplied by the program when it is built (an image shape, a number of classes); its *keyword-only* parameters, all with
defaults, are what a config may set. Constraints stand in the annotation, ``Annotated[float, Field(gt=0)]``. Options
that belong together are a group, a subclass of ``mea_ray.core.settings.Settings``. Nothing is imported before a name is
used.

A component may declare two attributes:

- ``version`` (an integer, 1 if it is missing) is part of the names of all that was made with it. Raise it when the
  component gives other results with the same settings.
- ``renamed`` maps old option names to the paths that replace them, e.g. ``{"carrier_rho": "carrier.rho"}``. The old
  names are accepted with a warning for one version.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model

from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Parameter, Settings, documented_arguments, parameters_of, problems, with_current_names
from mea_ray.core.words import nearest

__all__ = ["Parameter", "Table", "documented_arguments", "nearest"]

Component = Callable[..., Any]


class Table:
    """A table of components of one kind.

    Args:
        kind: What the components are, for messages, e.g. ``"attack"``.
        entries: ``{name: "module:attribute"}``.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self.entries = dict(entries)
        self._schemas: dict[str, type[Settings]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.kind, self.entries)  # the schemas are classes without a module; they are made again

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self.entries)

    def resolve(self, name: str) -> Component:
        """Import and return the component called ``name``.

        Raises:
            ConfigError: There is no such name; the message gives the nearest one and the list.
        """
        if name not in self.entries:
            names = self.names()
            raise ConfigError(f"unknown {self.kind} {name!r}{nearest(str(name), names)} Known: {', '.join(names)}")
        module, _, attribute = self.entries[name].partition(":")
        component: Component = getattr(importlib.import_module(module), attribute)
        return component

    def version(self, name: str) -> int:
        """Return the version of the component called ``name``."""
        return int(getattr(self.resolve(name), "version", 1))

    def parameters(self, name: str) -> list[Parameter]:
        """List what a config may set for ``name``; settings inside of a group by dotted paths."""
        component = self.resolve(name)
        docs = documented_arguments(component.__doc__)
        if inspect.isclass(component):
            docs = {**documented_arguments(component.__init__.__doc__), **docs}
        listed: list[Parameter] = []
        for option, field in self.schema(name).model_fields.items():
            listed += parameters_of(option, field, field.default, docs.get(option, ""))
        return listed

    def check(self, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Check parameters against the component's signature and fill in its defaults.

        Returns:
            Every parameter of the component with its value, converted to the annotated type. A group of settings is
            an object of its class.

        Raises:
            ConfigError: A parameter is unknown (with the nearest known one), has a value of the wrong type, or lies out
                of its range.
        """
        schema = self.schema(name)
        known = list(schema.model_fields)
        given = with_current_names(params, getattr(self.resolve(name), "renamed", {}), f"{self.kind} {name!r}")
        for key in given:
            if key not in known:
                hint = f"{nearest(key, known)} Known: {', '.join(known) or 'none'}"
                raise ConfigError(f"{self.kind} {name!r} has no parameter {key!r}{hint}")
        try:
            checked = schema.model_validate(given)
        except ValidationError as error:
            raise ConfigError(f"{self.kind} {name!r}: {'; '.join(problems(error, schema))}") from None
        return {key: getattr(checked, key) for key in known}

    def build(self, name: str, *args: Any, **params: Any) -> Any:
        """Build the component: ``args`` from the program, ``params`` from a config, checked first."""
        return self.resolve(name)(*args, **self.check(name, params))

    def schema(self, name: str) -> type[Settings]:
        """Return the parameters of the component called ``name`` as a group of settings."""
        if name not in self._schemas:
            component = self.resolve(name)
            hints = get_type_hints(component.__init__ if inspect.isclass(component) else component, include_extras=True)
            fields: dict[str, Any] = {
                p.name: (hints.get(p.name, Any), Field(default=p.default))
                for p in inspect.signature(component).parameters.values()
                if p.kind is p.KEYWORD_ONLY
            }
            self._schemas[name] = create_model(f"{self.kind}_{name}", __base__=_Parameters, **fields)
        return self._schemas[name]


class _Parameters(Settings):
    """Base of the parameters of a component."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
