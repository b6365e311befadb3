"""Tables of named components: lazy, picklable by name, with parameters that can be listed and checked.

A table maps a name to ``"module:attribute"``. The attribute is a class or a function. Its *positional* parameters are
supplied by the program when it is built (an image shape, a number of classes); its *keyword-only* parameters, all with
defaults, are the options of a config. Constraints stand in the annotation, ``Annotated[float, Field(gt=0)]``. Options
that belong together are a group, a subclass of ``mea_ray.core.settings.Settings``. Nothing is imported before a name is
used.

A component may declare two attributes:

- ``version`` (an integer, 1 if it is missing) is part of the names of everything made with it. Increase it when the
component gives other results with the same settings. - ``renamed`` maps old option names to the paths that replace
them, e.g. ``{"carrier_rho": "carrier.rho"}``. The old
  names are accepted with a warning for one version.
- ``moved`` maps options that moved to another component to that component, for the error message.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from pydantic import ConfigDict, Field, PydanticUserError, ValidationError, create_model

from mea_ray.core import plugins
from mea_ray.core.class_label import marker, names_in
from mea_ray.core.errors import ConfigError
from mea_ray.core.plugins import Component
from mea_ray.core.settings import (
    InvalidSettings,
    Parameter,
    SettingProblem,
    Settings,
    documented_arguments,
    parameters_of,
    printable,
    problems,
    with_current_names,
)
from mea_ray.core.words import nearest_and_known

__all__ = ["Component", "Parameter", "Table", "documented_arguments"]


class Table:
    """A table of components of one kind: our own, those of installed packages, and others by import path.

    Args:
        kind: Kind of the components, for messages, e.g. ``"attack"``.
        entries: ``{name: "module:attribute"}``, our own.
        group: Entry points of this group in other packages are components, too; none are when it is empty. A name of
            ours hides an entry point of the same name.
        base: ``module:Class`` that components of other packages must derive from; they are functions when it is empty.
        arguments: Number of positional arguments that a component is built with.
        adapt: ``module:function`` that gets what was imported from another package, and its name, and returns what
            stands in the table; empty to take it as it is.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, str],
        *,
        group: str = "",
        base: str = "",
        arguments: int = 0,
        adapt: str = "",
    ) -> None:
        self.kind, self.entries = kind, dict(entries)
        self.group, self.base, self.arguments, self.adapt = group, base, arguments, adapt
        self._schemas: dict[str, type[Settings]] = {}
        self._foreign: dict[str, Component] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # The schemas are classes without a module; they are made again.
        return _make, (self.kind, self.entries, self.group, self.base, self.arguments, self.adapt)

    def names(self) -> list[str]:
        """Return all names, ours and those of entry points, sorted."""
        return sorted({*self.entries, *plugins.installed(self.group)})

    def hidden(self) -> dict[str, str]:
        """Return the entry points that a name of ours hides, as ``{name: "module:attribute (package)"}``."""
        points = plugins.installed(self.group)
        return {
            name: f"{points[name][0].value} ({plugins.origin(points[name][0])})"
            for name in sorted(self.entries)
            if name in points
        }

    def origin(self, name: str) -> str:
        """Return where a component comes from: a package with its version, or a module; empty for our own."""
        if name in self.entries:
            return ""
        points = plugins.installed(self.group).get(name)
        return plugins.origin(points[0]) if points else name.partition(":")[0]

    def resolve(self, name: str) -> Component:
        """Import and return the component called ``name``.

        Raises:
            ConfigError: There is no such name (the message gives the nearest one and the list), or a component of
                another package cannot be imported or does not fit the table.
        """
        if name in self.entries:
            other = self.hidden().get(name)
            if other:
                warnings.warn(
                    f"{self.kind} {name!r} is our own and hides {other}; write module:attribute for that", stacklevel=2
                )
            module, _, attribute = self.entries[name].partition(":")
            component: Component = getattr(importlib.import_module(module), attribute)
            return component
        if name not in self._foreign:
            path, what = self._path(name), f"{self.kind} {name!r}"
            loaded = plugins.load(what, path)
            if self.adapt:
                module, _, attribute = self.adapt.partition(":")
                loaded = getattr(importlib.import_module(module), attribute)(loaded, path)
            plugins.check(what, loaded, self.base, self.arguments)
            self._foreign[name] = loaded
        return self._foreign[name]

    def usable(self) -> dict[str, Component]:
        """Return all components by name, without those of other packages that cannot be used."""
        components: dict[str, Component] = {}
        for name in self.names():
            try:
                components[name] = self.resolve(name)
            except ConfigError:
                continue
        return components

    def _path(self, name: str) -> str:
        """Return ``module:attribute`` of a component of another package."""
        points = plugins.installed(self.group).get(name, [])
        if len(points) > 1:
            choices = ", ".join(f"{point.value} ({plugins.origin(point)})" for point in points)
            raise ConfigError(f"{self.kind} {name!r} is given by several packages; write one of {choices}")
        if points:
            return points[0].value
        if self.group and plugins.is_path(name):
            return name
        names = self.names()
        hint = "; one of another package reads package.module:Attribute" if self.group and ":" in name else ""
        raise ConfigError(f"unknown {self.kind} {name!r}{nearest_and_known(name, names)}{hint}")

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

    def check(self, name: str, params: Mapping[str, Any], other: Sequence[str] = ()) -> dict[str, Any]:
        """Check parameters against the component's signature and fill in its defaults.

        Args:
            name: Name of the component.
            params: The given parameters.
            other: Further names to suggest for one that is unknown.

        Returns:
            Every parameter of the component with its value, converted to the annotated type. A group of settings is
            an object of its class.

        Raises:
            InvalidSettings: A parameter is unknown (with the nearest known one), has a value of the wrong type, or lies
                out of its range.
            ConfigError: There is no such component, or it cannot be used.
        """
        schema, owner = self.schema(name), f"{self.kind} {name!r}"
        known = list(schema.model_fields)
        given = with_current_names(params, getattr(self.resolve(name), "renamed", {}), owner)
        names = [*known, *other]
        issues = [
            SettingProblem(key, f"{owner} has no parameter {key!r}{self._hint(name, key, names)}")
            for key in given
            if key not in known
        ]
        try:
            checked = schema.model_validate({key: value for key, value in given.items() if key in known})
        except ValidationError as error:
            issues += problems(error, schema)
        if issues:
            raise InvalidSettings(owner, issues)
        return {key: getattr(checked, key) for key in known}

    def _hint(self, name: str, key: str, known: list[str]) -> str:
        """Return where an unknown parameter belongs, or the nearest known one."""
        owner = getattr(self.resolve(name), "moved", {}).get(key)
        if owner is not None:
            return f": it belongs to {self.kind} {owner!r} now; write name: {owner}"
        known = [each for each in known if not each.startswith("on_")]  # callbacks are not for configs
        return nearest_and_known(key, known)

    def build(self, name: str, *args: Any, **params: Any) -> Any:
        """Build the component: ``args`` from the program, ``params`` from a config, checked first."""
        checked = self.check(name, params)
        for key, field in self.schema(name).model_fields.items():
            if marker(field) is not None and names_in(checked[key]):
                text = "only the config of an experiment knows the classes by name; give indices"
                raise InvalidSettings(f"{self.kind} {name!r}", [SettingProblem(key, text, printable(checked[key]))])
        return self.resolve(name)(*args, **checked)

    def schema(self, name: str) -> type[Settings]:
        """Return the parameters of the component called ``name`` as a group of settings."""
        if name not in self._schemas:
            component = self.resolve(name)
            try:
                self._schemas[name] = _schema_of(component)
            except (NameError, TypeError, PydanticUserError) as error:
                raise ConfigError(
                    f"{self.kind} {name!r}: its options cannot be read: {type(error).__name__}: {error}; give each an "
                    "annotation that can be imported"
                ) from error
        return self._schemas[name]


def _make(kind: str, entries: Mapping[str, str], group: str, base: str, arguments: int, adapt: str) -> Table:
    return Table(kind, entries, group=group, base=base, arguments=arguments, adapt=adapt)


def _schema_of(component: Component) -> type[Settings]:
    hints = get_type_hints(component.__init__ if inspect.isclass(component) else component, include_extras=True)
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), Field(default=p.default))
        for p in inspect.signature(component).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(component.__name__, __base__=_Parameters, **fields)


class _Parameters(Settings):
    """Base of the parameters of a component."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
