"""Replaces class names in a config by class indices: ``target_class: bird``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from mea_ray.config.components import Choice, DataChoice
from mea_ray.config.paths import field_at, paths
from mea_ray.core.class_label import marker, names_in, with_indices
from mea_ray.core.settings import InvalidSettings, SettingProblem, Settings, Tree
from mea_ray.core.types import Dataset

_READ: dict[str, Dataset] = {}
"""The dataset that was last loaded for its class names: its experiment will soon need it."""
_KNOWN: ContextVar[dict[str, tuple[str, ...]] | None] = ContextVar("class names by dataset", default=None)


def with_class_indices(settings: Settings, data: DataChoice, path: str = "") -> Settings:
    """Return settings with class names replaced by class indices.

    A dataset is loaded only if one of its classes is named.

    Args:
        settings: A section of an experiment.
        data: The experiment's dataset.
        path: Config path of the section, for messages.

    Raises:
        InvalidSettings: The data have no class with this name.
        DataError: Classes are named, and the data cannot be loaded.
    """
    fields = dict(type(settings).model_fields)
    values = {key: getattr(settings, key) for key in fields}
    if isinstance(settings, Choice):
        fields |= settings.components().schema(settings.name).model_fields
        values |= settings.params
    changes = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        mark = marker(fields[key])
        if mark is None:
            changed = _inside(value, data, where)
        else:
            changed = _indexed(value, values.get(mark.dataset) if mark.dataset else data, where)
        if changed is not value:
            changes[key] = changed
    return settings.model_copy(update=changes) if changes else settings


def _inside(value: Any, data: DataChoice, path: str) -> Any:
    if isinstance(value, Settings):
        return with_class_indices(value, data, path)
    if isinstance(value, tuple):
        changed = tuple(_inside(each, data, f"{path}.{place}") for place, each in enumerate(value))
        return changed if any(new is not old for new, old in zip(changed, value, strict=True)) else value
    return value


def _indexed(value: Any, data: Any, path: str) -> Any:
    """Return the indices of the classes that a value names."""
    named = names_in(value)
    if not named:
        return value
    if not isinstance(data, DataChoice):
        raise InvalidSettings("", [SettingProblem(path, "there is no dataset to look up class names in; give indices")])
    try:
        return with_indices(value, class_names(data))
    except ValueError as error:
        raise InvalidSettings("", [SettingProblem(path, str(error), ", ".join(map(repr, named)))]) from None


def named_classes(model: type[Settings], tree: Tree) -> list[str]:
    """Return the config paths with class names in a tree that was not checked yet."""
    named = []
    for path in paths(model, tree):
        field = field_at(model, tree, path)
        value: Any = tree
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if field is not None and marker(field) is not None and names_in(value):
            named.append(path)
    return named


def class_names(data: DataChoice) -> tuple[str, ...]:
    """Return the names of a dataset's classes, in the order of their indices; cached in ``loaded_once``.

    The dataset is left for ``build_data``, so that an experiment that names classes loads it once.

    Raises:
        DataError: It cannot be loaded.
    """
    key = data.model_dump_json()
    known = _KNOWN.get()
    names: tuple[str, ...] | None = None if known is None else known.get(key)
    if names is None:
        dataset = build_data(data)
        names = tuple(dataset.train.class_names)
        _READ.clear()
        _READ[key] = dataset
        if known is not None:
            known[key] = names
    return names


def build_data(data: DataChoice) -> Dataset:
    """Load a dataset, or take the one that was just loaded for its class names.

    Raises:
        DataError: It cannot be loaded.
    """
    key = data.model_dump_json()
    dataset: Dataset = _READ.pop(key) if key in _READ else data.build()
    return dataset


@contextmanager
def loaded_once() -> Iterator[None]:
    """Load a dataset at most once for all configs that are read in the block."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)
