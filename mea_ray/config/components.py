"""The base of every section of a config, and the choice of a component with its own parameters from a table."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from mea_ray.core.errors import ConfigError
from mea_ray.core.registry import Table
from mea_ray.core.settings import Parameter, RefusedSettings, Settings, Tree


class Config(Settings):
    """Base of every section of a config."""


class Choice(Config):
    """A component chosen by ``name`` from a table, with its own parameters beside the name.

    ``data: digits`` is short for ``data: {name: digits}``. Parameters are checked against the component's signature
    and its defaults filled in, so that a resolved config is complete.
    """

    model_config = ConfigDict(extra="allow")
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
        if not isinstance(value, Mapping):
            return value
        table = cls.components()
        if not isinstance(value.get("name"), str):
            raise RefusedSettings(ConfigError(f"{table.kind} needs a `name`; known: {', '.join(table.names())}"))
        own = {key: item for key, item in value.items() if key in cls.model_fields}
        params = {key: item for key, item in value.items() if key not in cls.model_fields}
        others = [key for key in cls.model_fields if key != "name"]
        try:
            return {**own, **table.check(value["name"], params, others)}
        except ConfigError as error:
            raise RefusedSettings(error) from None

    def over(self, given: Mapping[str, Any]) -> Tree:
        """Return ``given``, completed with this choice if it names no component itself."""
        return dict(given) if "name" in given else {"name": self.name, **self.params, **given}

    @classmethod
    def parameters(cls, prefix: str = "", default: Settings | None = None, doc: str = "") -> Iterator[Parameter]:
        """List only the name: the other settings depend on it."""
        yield Parameter(f"{prefix}name", cls.components().kind, getattr(default, "name", None), doc)

    @property
    def label(self) -> str:
        """Short name, for files: that in the table, or the attribute of ``package.module:Attribute``."""
        return self.name.rpartition(":")[2]

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
    """What the victim's API reveals in its answers."""

    table: ClassVar[str] = "mea_ray.blackbox:POLICIES"


class CombinerChoice(Choice):
    """A way to mix two images into one."""

    table: ClassVar[str] = "mea_ray.watermarks.combiners:COMBINERS"


class PretextChoice(Choice):
    """The training signal of the main task; ``none`` means labels, everything else makes the victim an encoder."""

    table: ClassVar[str] = "mea_ray.pretext:PRETEXTS"
