"""A user's own Python packages, which the other processes and machines of a sweep must import, too."""

from __future__ import annotations

import importlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_ray.core import plugins
from mea_ray.core.errors import ConfigError
from mea_ray.storage.files import at_home


def modules_to_send(tree: Mapping[str, Any], given: Sequence[str] | None, address: str | None) -> list[str]:
    """Return the folders and files that Ray has to send to its workers.

    Args:
        tree: The resolved config, of a sweep with its space.
        given: ``resources.py_modules``. Where it is None, the packages of all components that ``tree`` names as
            ``package.module:Attribute`` and that are not installed. The workers of a Ray started here find the working
            directory anyway.
        address: The cluster; None for a Ray started on this machine.

    Raises:
        ConfigError: ``given`` names something that does not exist.
    """
    if given is not None:
        return [_checked(path) for path in given]
    modules: dict[str, None] = {}
    for module in sorted({name.partition(".")[0] for name in _outside(tree)}):
        path = _path_of(module)
        if path is not None and not (address is None and path.parent == Path.cwd()):
            modules[str(path)] = None
    return list(modules)


def _outside(tree: Any) -> Iterator[str]:
    """Yield ``package.module`` of every ``package.module:Attribute`` in a config."""
    if isinstance(tree, str):
        if plugins.is_path(tree):
            yield tree.partition(":")[0]
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _outside(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _outside(value)


def _path_of(module: str) -> Path | None:
    """Return the folder or file of a top-level module; None if it is installed here, and thus on every machine."""
    try:
        imported = importlib.import_module(module)
    except ImportError:
        return None  # not a component: those were imported when the config was read
    file = getattr(imported, "__file__", None)
    places = list(getattr(imported, "__path__", [])) or ([file] if file else [])
    if len(places) != 1:
        return None  # built in, or a namespace package over several folders
    path = Path(places[0]).absolute()
    installed = [Path(sysconfig.get_path(name)).absolute() for name in ("purelib", "platlib", "stdlib")]
    ours = Path(__file__).parents[1]
    return None if path == ours or any(path.is_relative_to(folder) for folder in installed) else path


def _checked(given: str) -> str:
    if "://" in given:
        return given
    path = at_home(given, "resources.py_modules")
    if not (path.is_dir() or (path.is_file() and path.suffix in {".py", ".whl"})):
        raise ConfigError(
            f"resources.py_modules: {given!r} is neither the folder of a package nor a .py or .whl file (looked for in "
            f"{os.getcwd()})"
        )
    return str(path.absolute())
