"""The base of every section of a config, and the choice of a component from a table with parameters of its own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mea_ray.config.overrides import Tree
from mea_ray.core.errors import ConfigError
from mea_ray.core.registry import Table


class Config(BaseModel):
    """Base of every section: frozen, unknown keys refused, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _default_components(cls, value: Any) -> Any:
        """Parameters of a component without a ``name`` belong to the default component."""
        if not isinstance(value, Mapping):
            return value
        filled = dict(value)
        for field, item in value.items():
            info = cls.model_fields.get(field)
            kind = info.annotation if info is not None and info.default_factory else None
            if isinstance(item, Mapping) and "name" not in item and isinstance(kind, type) and issubclass(kind, Choice):
                filled[field] = {"name": cls.model_fields[field].get_default(call_default_factory=True).name, **item}
        return filled

    def resolved(self) -> Tree:
        """Return the whole tree as plain JSON types, defaults filled in."""
        return self.model_dump(mode="json")


class Choice(Config):
    """A component chosen by ``name`` from a table, with its own parameters beside the name.

    ``data: digits`` is short for ``data: {name: digits}``. Parameters are checked against the component's signature
    and its defaults filled in, so that a resolved config says everything.
    """

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True, protected_namespaces=())
    table: ClassVar[str] = ""
    name: str = Field(description="Name in the table; `mea-ray list` shows all.")

    @classmethod
    def components(cls) -> Table:
        """Return the table that ``name`` is looked up in."""
        module, _, attribute = cls.table.partition(":")
        table: Table = getattr(importlib.import_module(module), attribute)
        return table

    @model_validator(mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping):
            if "name" not in value:
                raise ConfigError(
                    f"{cls.components().kind} needs a `name`; known: {', '.join(cls.components().names())}"
                )
            params = {key: item for key, item in value.items() if key != "name"}
            return {"name": value["name"], **cls.components().check(str(value["name"]), params)}
        return value

    @property
    def params(self) -> Tree:
        """The component's parameters, without its name."""
        return dict(self.__pydantic_extra__ or {})

    def build(self, *args: Any, **extra: Any) -> Any:
        """Build the component; ``args`` are what the program supplies at run time."""
        return self.components().build(self.name, *args, **{**self.params, **extra})


class DataChoice(Choice):
    """A dataset."""

    table: ClassVar[str] = "mea_ray.data:DATASETS"


class ModelChoice(Choice):
    """A network."""

    table: ClassVar[str] = "mea_ray.models:MODELS"


class WatermarkChoice(Choice):
    """A watermark scheme; ``none`` trains an innocent model."""

    table: ClassVar[str] = "mea_ray.watermarks:WATERMARKS"


class AttackChoice(Choice):
    """An extraction attack."""

    table: ClassVar[str] = "mea_ray.attacks:ATTACKS"


class RemovalChoice(Choice):
    """An attempt to remove the watermark from a model."""

    table: ClassVar[str] = "mea_ray.removal:REMOVALS"


class DetectionChoice(Choice):
    """An attempt to find the watermark in a model, or its samples among queries."""

    table: ClassVar[str] = "mea_ray.detection:DETECTIONS"


class PolicyChoice(Choice):
    """How the victim's API words its answers."""

    table: ClassVar[str] = "mea_ray.blackbox:POLICIES"


class PretextChoice(Choice):
    """What the main task is learnt from; ``none`` are the labels, everything else makes the victim an encoder."""

    table: ClassVar[str] = "mea_ray.pretext:PRETEXTS"
