"""The papers' figures, to be shown beside our own (``published.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from mea_ray.config import yaml_text
from mea_ray.results.points import setting

Percent = Annotated[float, Field(ge=0, le=100)]
Figure = Percent | tuple[Percent, Percent]


class Published(BaseModel):
    """One row of a paper's table. Numbers are in percent; a pair is mean and standard deviation.

    Attributes:
        sweep: Name of our sweep that measures the same.
        model: The kind of model, as in ``mea_ray.load_results``.
        where: Config paths with the values that a comparable trial must have.
        queries: Budget of the substitute; any when None.
        removal: Settings that the removal must have.
        tried_on: The model to which the removal was applied.
        accuracy: Test accuracy.
        wsr: Watermark success rate.
        wfpr: Watermark false-positive rate.
        source: Paper, and table or figure.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    sweep: str
    model: Literal["victim", "substitute", "after removal"]
    where: dict[str, str] = Field(default_factory=dict)
    queries: int | None = None
    removal: dict[str, Any] = Field(default_factory=dict)
    tried_on: Literal["substitute", "victim", "null_model"] | None = None
    accuracy: Figure | None = None
    wsr: Figure | None = None
    wfpr: Figure | None = None
    source: str

    def text(self) -> str:
        """Return accuracy, WSR and WFPR, those that are known, as one cell of a table."""
        named = {"accuracy": self.accuracy, "WSR": self.wsr, "WFPR": self.wfpr}
        return ", ".join(f"{name} {_number(value)}" for name, value in named.items() if value is not None)


@cache
def all_published() -> tuple[Published, ...]:
    """Return every published figure."""
    text = (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[Published, ...]).validate_python(yaml_text.parse(text, "published.yaml"))


def find(
    sweep: str,
    model: str,
    config: Mapping[str, Any],
    *,
    queries: int | None = None,
    removal: Mapping[str, Any] | None = None,
    tried_on: str | None = None,
) -> Published | None:
    """Return a paper's figures for one of our models; None without any.

    Args:
        sweep: Name of the sweep.
        model: The kind of model.
        config: The trial's resolved config.
        queries: Budget of the substitute.
        removal: Settings of the removal.
        tried_on: The model to which the removal was applied.
    """
    for entry in all_published():
        if (entry.sweep, entry.model) != (sweep, model):
            continue
        if entry.queries not in {None, queries} or entry.tried_on not in {None, tried_on}:
            continue
        if any((removal or {}).get(key) != value for key, value in entry.removal.items()):
            continue
        if all(_at(config, path) == value for path, value in entry.where.items()):
            return entry
    return None


def _at(config: Mapping[str, Any], path: str) -> str | None:
    """Return the value at a config path as text: the name of a component, else the value itself."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return str(value.get("name")) if isinstance(value, Mapping) else setting(value)


def _number(value: float | tuple[float, float]) -> str:
    return f"{value[0]:g}% ± {value[1]:g}" if isinstance(value, tuple) else f"{value:g}%"
