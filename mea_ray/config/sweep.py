"""The settings of a sweep: a base experiment and a space over its config paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mea_ray.config.class_names import named_classes
from mea_ray.config.components import Config
from mea_ray.config.experiment import ExperimentConfig
from mea_ray.core.plugins import is_path
from mea_ray.core.settings import InvalidSettings, RefusedSettings, SettingProblem
from mea_ray.core.words import nearest_and_known

RESERVED_NAMES = frozenset({"artifacts", "calibration", "keys", "local"})
"""Folders of a storage that do not belong to a sweep."""
MAX_POINTS = 100_000
"""Maximum number of trials of a sweep."""
SpaceEntry = Mapping[str, Any]
Mode = Literal["max", "min"]


def _known_or_imported(value: str, known: tuple[str, ...]) -> str:
    if value not in known and not is_path(value):
        raise ValueError(
            f"{value!r} is unknown{nearest_and_known(value, known)}; a class of Ray Tune or of your "
            "own reads package.module:Class"
        )
    return value


class SearchConfig(Config):
    """Which points of the space are tried."""

    name: str = Field(
        "grid",
        description="grid: every combination; random; optuna; or the import path of a searcher of Ray Tune, "
        "package.module:Class.",
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Parameters of an imported searcher.")
    samples: int = Field(
        1, ge=1, le=MAX_POINTS, description="random, optuna: number of drawn points (times the grid, for random)."
    )
    metric: str | tuple[str, ...] = Field(
        "wsr",
        description="Metric of the last rung that optuna and asha optimise; several: optuna searches for their "
        "Pareto front.",
    )
    mode: Mode | tuple[Mode, ...] = Field("max", description="Direction of `metric`; a list if that is one.")
    constraints: dict[str, float] = Field(
        default_factory=dict,
        description="{metric: largest value allowed}, e.g. {victim_gap: 0.02}: a victim at most 2 points less accurate "
        "than an innocent model. A trial that violates one is infeasible.",
    )
    seed: int = Field(0, ge=0, description="Seed of the draw.")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return _known_or_imported(value, ("grid", "random", "optuna"))

    @property
    def adaptive(self) -> bool:
        """Whether points are chosen while the sweep runs."""
        return self.name not in {"grid", "random"}

    @property
    def objectives(self) -> tuple[tuple[str, Mode], ...]:
        """Metrics with their directions; asha uses the first."""
        if isinstance(self.metric, tuple):
            return tuple(zip(self.metric, self.mode, strict=True))  # type: ignore[arg-type]
        return ((self.metric, self.mode),)  # type: ignore[return-value]

    @model_validator(mode="after")
    def _params_of_an_import(self) -> SearchConfig:
        if self.params and not is_path(self.name):
            raise ValueError(
                f"params={self.params!r} are those of an imported searcher, but name={self.name!r} is ours"
            )
        return self

    @model_validator(mode="after")
    def _one_mode_for_each_metric(self) -> SearchConfig:
        metrics, modes = (1 if isinstance(v, str) else len(v) for v in (self.metric, self.mode))
        if isinstance(self.metric, str) != isinstance(self.mode, str) or metrics != modes or not metrics:
            raise ValueError(f"metric={self.metric!r} and mode={self.mode!r}: give one mode for each metric")
        return self


class SelectConfig(Config):
    """How settings are chosen: by this sweep, or by an earlier one before the results of this one were known.

    Test images are never used to choose. A sweep that chooses judges its models on validation images
    (``base.splits.held_out``), with development seeds. One that reports has other seeds and names the sweep that chose.
    """

    metric: str = Field("wsr", description="Metric of the last rung by which settings are chosen, as `search.metric`.")
    mode: Mode = Field("max", description="Direction of `metric`.")
    constraints: dict[str, float] = Field(
        default_factory=dict, description="{metric: largest value allowed}, as `search.constraints`."
    )
    data: Literal["validation"] = Field("validation", description="Images on which `metric` is measured.")
    seeds: tuple[int, ...] = Field(..., min_length=1, description="Development seeds: those of the sweep that chooses.")
    sweep: str = Field("", description="Name of the sweep that chose; empty if this one chooses.")

    @field_validator("data", mode="before")
    @classmethod
    def _not_on_test_images(cls, value: Any) -> Any:
        if value != "validation":
            raise ValueError(
                f"settings are chosen on validation images, not on {value!r}; test images are never used to choose"
            )
        return value


class SchedulerConfig(Config):
    """Which trials are stopped early."""

    name: str = Field(
        "fifo",
        description="asha stops trials that lag at a rung; fifo stops none; or the import path of a "
        "scheduler of Ray Tune, package.module:Class.",
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Parameters of an imported scheduler.")
    reports: Literal["rung", "epoch"] = Field(
        "rung",
        description="rung: a trial can be stopped after each rung; epoch: also after each epoch, by the training loss "
        "of its victim and of its substitutes.",
    )
    grace_epochs: int = Field(
        5, ge=1, description="asha with reports: epoch: number of epochs before a trial can be stopped."
    )
    grace_rungs: int = Field(1, ge=1, description="asha: number of rungs before a trial can be stopped.")
    reduction_factor: float = Field(3.0, gt=1, description="asha: one in this many trials continues.")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return _known_or_imported(value, ("fifo", "asha"))

    @model_validator(mode="after")
    def _params_of_an_import(self) -> SchedulerConfig:
        if self.params and not is_path(self.name):
            raise ValueError(
                f"params={self.params!r} are those of an imported scheduler, but name={self.name!r} is ours; it has "
                "grace_rungs and reduction_factor"
            )
        return self


class PricesConfig(Config):
    """What a sweep's resources cost; used only by the report."""

    hour: float = Field(0.0, ge=0, description="Price of one hour of one trial, for its share of a machine.")
    query: float = Field(0.0, ge=0, description="Price of one image answered by the service.")
    currency: str = Field("USD", min_length=1, max_length=8, description="Currency of both.")


class KeepConfig(Config):
    """What remains in the storage of a finished trial, besides its result."""

    substitutes: bool = Field(True, description="The stolen models; W&B and pictures of samples need them.")
    stolen_nulls: bool = Field(True, description="The stolen null models, which trials with the same thief share.")
    answers: bool = Field(True, description="The transfer set: queried images with their answers.")
    query_logs: bool = Field(
        True, description="The owner's log of its queries; the evaluation of the log is in the result."
    )


class SweepConfig(Config):
    """A sweep: a base experiment and a space over its config paths."""

    name: str = Field(
        "sweep",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="Name of the results folder; begins with a letter or digit.",
    )
    description: str = Field("", description="One paragraph for the report.")
    base: ExperimentConfig = Field(default_factory=ExperimentConfig, description="Settings common to all trials.")
    space: dict[str, SpaceEntry] = Field(
        default_factory=dict,
        description="{config path: {grid: [...]} | {choice: [...]} | {uniform: [low, high]} | "
        "{loguniform: [low, high]}}",
    )
    seeds: int | tuple[int, ...] | None = Field(
        None,
        description="Repeat every point with this number of seeds, starting from 0, or with the listed seeds; null "
        "keeps the base's seed.",
    )
    seeds_of: Literal["thief", "victim", "both"] = Field(
        "thief",
        description="What `seeds` vary: `seed` (thief, verification), `victim.seed` (one victim per seed, each with "
        "its own key), or both together.",
    )
    search: SearchConfig = Field(default_factory=SearchConfig, description="Which points are tried.")
    select: SelectConfig | None = Field(
        None, description="How settings are, or were, chosen; recorded in the report and in every result."
    )
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig, description="Which trials are stopped early.")
    stop: dict[str, float] = Field(
        default_factory=dict,
        description="{metric: value}: a trial ends at the first rung whose metric reaches the value; also "
        "training_iteration, the number of rungs.",
    )
    time_budget_s: float | None = Field(
        None, gt=0, description="Time budget of the sweep in seconds, after which all trials stop; --resume continues."
    )
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="Maximum number of concurrent trials; null: as many as the resources permit."
    )
    callbacks: tuple[str, ...] = Field(
        (), description="Callbacks of Ray Tune by import path, package.module:Class, built without arguments."
    )
    prices: PricesConfig = Field(
        default_factory=PricesConfig, description="Prices from which the report computes costs."
    )
    max_services: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Maximum number of victim services up at once, with reserved resources; auto: the number with "
        "which most trials run.",
    )
    max_failures: int = Field(3, ge=0, description="Maximum number of restarts of a trial whose process died.")
    keep: KeepConfig = Field(default_factory=KeepConfig, description="What remains in the storage of finished trials.")
    cluster_wait_s: float = Field(
        0.0, ge=0, description="Maximum wait for a cluster with an autoscaler to grow, in seconds; 0 does not wait."
    )

    @model_validator(mode="before")
    @classmethod
    def _classes_of_one_dataset(cls, value: Any) -> Any:
        """Reject class names in the base of a sweep over datasets: each dataset has its own indices for them."""
        base, space = (value.get(key) for key in ("base", "space")) if isinstance(value, Mapping) else (None, None)
        if not isinstance(base, Mapping) or not isinstance(space, Mapping):
            return value
        axis = next((path for path in space if str(path).split(".")[0] == "data"), None)
        named = named_classes(ExperimentConfig, dict(base)) if axis is not None else []
        lost = [path for path in named if path not in space]
        if lost:
            text = f"the base names a class, but the space has {axis}; name it in the space, or give its index"
            raise RefusedSettings(InvalidSettings("", [SettingProblem(f"base.{path}", text) for path in lost]))
        return value

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value.lower() in RESERVED_NAMES:
            raise ValueError(f"the storage uses this name for something else ({', '.join(sorted(RESERVED_NAMES))})")
        return value

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        if isinstance(value, int) and not 1 <= value <= MAX_POINTS:
            raise ValueError(f"a number of seeds must be between 1 and {MAX_POINTS}")
        if isinstance(value, tuple) and (not value or min(value) < 0 or len(set(value)) < len(value)):
            raise ValueError("listed seeds must be distinct non-negative integers, at least one")
        return value

    @model_validator(mode="after")
    def _chosen_on_other_images_and_seeds(self) -> SweepConfig:
        if self.select is None:
            return self
        own, held_out = self.listed_seeds, self.base.splits.held_out
        development = set(self.select.seeds)
        if "splits.held_out" in self.space or "splits" in self.space:
            raise ValueError("select: all trials must be judged on the same images; remove splits.held_out from space")
        if not self.select.sweep and held_out != "validation":
            raise ValueError(
                f"select: this sweep chooses settings, but measures {self.select.metric} on test images; set "
                "base.splits.held_out=validation, or name the sweep that chose in select.sweep"
            )
        if not self.select.sweep and own != development:
            raise ValueError(
                f"select: the development seeds are {sorted(development)}, but the sweep that chooses has the seeds "
                f"{sorted(own)}; set seeds={sorted(development)}"
            )
        if self.select.sweep and held_out != "test":
            raise ValueError("select: a sweep that reports judges on test images; set base.splits.held_out=test")
        if self.select.sweep and own & development:
            raise ValueError(
                f"select: the seeds {sorted(own & development)} chose the settings, so they cannot report them; set "
                "other `seeds`"
            )
        return self

    @property
    def listed_seeds(self) -> set[int]:
        """The seeds with which every point is repeated, or those of the base."""
        if isinstance(self.seeds, int):
            return set(range(self.seeds))
        if self.seeds is not None:
            return set(self.seeds)
        return {self.base.seed, self.base.victim.seed}

    @property
    def seed_points(self) -> list[dict[str, int]]:
        """Config paths and values of each seed with which every point is repeated."""
        paths = {"thief": ["seed"], "victim": ["victim.seed"], "both": ["seed", "victim.seed"]}[self.seeds_of]
        listed = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        return [{}] if listed is None else [dict.fromkeys(paths, seed) for seed in listed]
