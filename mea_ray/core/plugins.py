"""Components from other packages: by ``package.module:Attribute``, or by an entry point of an installed package.

A module can also be in the working directory, which is searched last, so that it does not hide an installed package.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any

from mea_ray.core.errors import ConfigError
from mea_ray.core.words import nearest

Component = Callable[..., Any]


def is_path(name: str) -> bool:
    """Say whether ``name`` reads ``package.module:Attribute``."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def installed(group: str) -> dict[str, list[EntryPoint]]:
    """Return the entry points of a group by name; several packages may give the same name."""
    points: dict[str, list[EntryPoint]] = {}
    if group:
        for point in _entry_points(group, tuple(sys.path)):
            same = points.setdefault(point.name, [])
            if point.value not in {other.value for other in same}:  # one package may be found twice
                same.append(point)
    return points


@lru_cache(maxsize=64)
def _entry_points(group: str, path: tuple[str, ...]) -> EntryPoints:
    """Read the entry points of all packages on ``path``, which is ``sys.path``."""
    return entry_points(group=group)


def origin(point: EntryPoint) -> str:
    """Return the package of an entry point and its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def load(what: str, path: str) -> Component:
    """Import ``package.module:Attribute``.

    Args:
        what: Description for messages, e.g. ``attack 'mine'``.
        path: Its path.

    Raises:
        ConfigError: There is no such module or attribute, or the module fails when it is imported.
    """
    name, _, attribute = path.partition(":")
    if not is_path(path):
        raise ConfigError(f"{what}: {path!r} must read package.module:Attribute")
    _look_in_working_directory()
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}.")
        remedy = "install its package, or start in the folder that contains it" if missing else "repair the module"
        raise ConfigError(f"{what}: cannot import {name!r}: {type(error).__name__}: {error}; {remedy}") from error
    if not hasattr(module, attribute):
        public = [each for each in vars(module) if not each.startswith("_")]
        raise ConfigError(f"{what}: module {name!r} has no {attribute!r}{nearest(attribute, public)}")
    component: Component = getattr(module, attribute)
    return component


def _look_in_working_directory() -> None:
    """Let modules be imported from the working directory; a script that pip installed does not by itself."""
    try:
        here = os.getcwd()
    except OSError:  # it was deleted
        return
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()


def check(what: str, component: Any, base: str, arguments: int) -> None:
    """Check that a component of another package fits a table.

    Args:
        what: Description for messages.
        component: The imported object.
        base: ``module:Class`` that it must derive from, or whose attributes it must have if that is a protocol; empty
            for a function.
        arguments: Positional arguments that it is built with.

    Raises:
        ConfigError: It is no class, or no function; it does not derive from ``base``; or its parameters are not those
            that the program gives by position, followed by keyword-only ones with defaults.
    """
    if not base:
        if inspect.isclass(component) or not callable(component):
            raise ConfigError(f"{what} must be a function, got {component!r}")
    else:
        module, _, attribute = base.partition(":")
        _check_class(what, component, getattr(importlib.import_module(module), attribute))
    try:
        parameters = inspect.signature(component).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: its parameters cannot be read: {error}") from None
    _check_parameters(what, parameters, arguments)


def _check_class(what: str, component: Any, base: type) -> None:
    name = f"{base.__module__}.{base.__name__}"
    if not inspect.isclass(component):
        raise ConfigError(f"{what} must be a class that derives from {name}, got {component!r}")
    if getattr(base, "_is_protocol", False):
        members = [each for each in {**vars(base), **base.__annotations__} if not each.startswith("_")]
        lacking = [each for each in members if not hasattr(component, each)]
        if lacking:
            raise ConfigError(f"{what} lacks {', '.join(lacking)} of {name}")
    elif not issubclass(component, base):
        bases = ", ".join(each.__name__ for each in component.__mro__[1:])
        raise ConfigError(f"{what} must derive from {name}, got a class that derives from {bases}")
    abstract = sorted(getattr(component, "__abstractmethods__", ()))
    if abstract:
        raise ConfigError(f"{what} must define {', '.join(abstract)} of {name}")


def _check_parameters(what: str, parameters: Mapping[str, inspect.Parameter], arguments: int) -> None:
    positional = [p for p in parameters.values() if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    by_position = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if len(positional) != arguments and not (by_position and len(positional) < arguments):
        raise ConfigError(
            f"{what} takes {[p.name for p in positional]} by position, it is built with {arguments} such arguments; "
            "options must be keyword-only: write * before them"
        )
    required = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if required:
        raise ConfigError(f"{what} has options without a default: {', '.join(required)}; give each one")
