"""The configuration of one experiment: a tree of frozen models, read from YAML, overridden by ``key.path=value``.

No class below ``pipeline.py`` receives one of these objects; it gets plain keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from mea_ray.config.components import (
    AttackChoice,
    Config,
    DataChoice,
    DetectionChoice,
    ModelChoice,
    PretextChoice,
    RemovalChoice,
    WatermarkChoice,
)
from mea_ray.config.overrides import load_tree, merge, parse_override
from mea_ray.config.running import ResourcesConfig, ServiceConfig, TrackingConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import problems
from mea_ray.storage.files import write_whole

Fraction = float
Suspect = Literal["substitute", "victim", "null_model"]
ModelT = TypeVar("ModelT", bound="Config")


class SplitsConfig(Config):
    """Who sees which images."""

    validation_fraction: Fraction = Field(0.05, gt=0, lt=0.5, description="Of train: early stop of the victim.")
    verification_fraction: Fraction = Field(
        0.2, gt=0, lt=1, description="Of test (36 of a class at least, up to half of it): for watermark samples."
    )
    thief_pool: Literal["train", "disjoint"] | DataChoice = Field(
        "train",
        description="The thief's images: the victim's own training images (the paper's setting), a disjoint part of "
        "train, or another dataset.",
    )
    disjoint_fraction: Fraction = Field(0.5, gt=0, lt=1, description="Of train: the thief's part under `disjoint`.")

    @field_validator("thief_pool", mode="before")
    @classmethod
    def _pool(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in {"train", "disjoint"}:
            return DataChoice.model_validate(value)
        return DataChoice.model_validate(value) if isinstance(value, Mapping) else value


class TrainingConfig(Config):
    """How a network is trained; the same engine for victims, null models and substitutes."""

    epochs: int = Field(20, ge=1, description="Passes over the training images.")
    batch_size: int = Field(128, ge=1, description="Images of the main task per step.")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="Optimiser.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd.")
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = Field(
        "one_cycle", description="Learning rate over the epochs."
    )
    step_epochs: int = Field(10, ge=1, description="`step`: epochs between two cuts of the learning rate.")
    step_factor: float = Field(0.5, gt=0, le=1, description="`step`: what the learning rate is multiplied by.")
    warmup_fraction: Fraction = Field(0.2, ge=0, lt=1, description="`one_cycle`: part of the steps spent rising.")
    augment: tuple[Literal["flip", "crop"], ...] = Field(
        ("flip", "crop"), description="Random horizontal flip; random crop after reflecting `crop_padding` pixels."
    )
    crop_padding: int = Field(4, ge=1, description="Pixels reflected at each side before the random crop.")
    gradient_clip: float | None = Field(None, gt=0, description="Largest gradient norm; none when null.")
    accumulate_steps: int = Field(1, ge=1, description="Batches whose gradients are summed for one update.")
    early_stop_patience: int | None = Field(
        None, ge=1, description="Epochs without a better validation accuracy before stopping; null never stops."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16 autocast where the device computes it natively, else float32."
    )
    channels_last: bool | None = Field(None, description="Memory format; null chooses by device.")
    compile: bool = Field(False, description="torch.compile the network.")


class VictimConfig(Config):
    """The model that is sold as an API. Everything here, with `data` and `splits`, names the artifact."""

    model: ModelChoice = Field(default_factory=lambda: ModelChoice(name="vgg_like"), description="Architecture.")
    pretext: PretextChoice = Field(
        default_factory=lambda: PretextChoice(name="none"),
        description="What the main task is learnt from: labels (none), or views without labels: then victim, null "
        "models and substitutes are encoders, and the API answers with embeddings.",
    )
    watermark: WatermarkChoice = Field(
        default_factory=lambda: WatermarkChoice(name="mea_defender"), description="Watermark scheme."
    )
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="Training of the victim and of the null models."
    )
    seed: int = Field(0, ge=0, description="Seed of the key, the initial weights and the batches.")


class LearningConfig(Config):
    """How a substitute learns from answers, whatever the attack: its loss, and the thief's own defences."""

    temperature: float | None = Field(
        None, gt=0, description="Softens answers and substitute; null takes the attack's own (distillation: 7, else 1)."
    )
    loss: Literal["kl", "soft_ce", "l1"] = Field(
        "kl", description="kl: KL(answer || substitute); soft_ce: cross-entropy with the answer; l1: of probabilities."
    )
    scale_by_temperature_squared: bool = Field(
        False, description="Multiply the loss by temperature**2 (Hinton et al.); MEA-Defender's authors leave it out."
    )
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="Of the answered images: held out for `early_stop_patience`, charged like all."
    )
    floor: float = Field(
        1e-12, gt=0, lt=1e-2, description="Least probability assumed for a class when the temperature is not 1."
    )
    mixing: Literal["none", "mixup", "cutmix"] = Field(
        "none", description="Train on mixtures of answered images: a defence against backdoors that asks nothing."
    )
    mixing_alpha: float = Field(1.0, gt=0, description="Both parameters of the Beta distribution of the mixing ratio.")
    label_smoothing: Fraction = Field(0.0, ge=0, lt=1, description="Part of each target spread over all classes.")
    statistics: Literal["pool", "none"] = Field(
        "pool", description="Substitute's normalisation: the thief's own pool's statistics, or none (raw [0, 1])."
    )


class ThiefConfig(Config):
    """The thief: an attack, what it may spend, and the substitute that it trains."""

    attack: AttackChoice = Field(
        default_factory=lambda: AttackChoice(name="distillation"), description="Extraction attack."
    )
    budgets: tuple[int, ...] = Field(
        (1000,),
        min_length=1,
        description="Images answered, rising; one fresh substitute for each, nested transfer sets.",
    )
    accounts: int = Field(
        1, ge=1, description="Clients that the thief registers as; images and budget are dealt out over them in turn."
    )
    model: ModelChoice = Field(
        default_factory=lambda: ModelChoice(name="vgg_like"), description="Architecture of the substitute."
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Training of each substitute.")
    learning: LearningConfig = Field(
        default_factory=LearningConfig, description="What each substitute learns from the answers."
    )

    @field_validator("budgets")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(b < 1 for b in value) or any(a >= b for a, b in zip(value, value[1:], strict=False)):
            raise ValueError(f"budgets must be positive and strictly rising, got {list(value)}")
        return value


class RemovalConfig(Config):
    """What is done to the stolen model of the largest budget to get the watermark out of it."""

    methods: tuple[RemovalChoice, ...] = Field(
        (), description="Removals; each starts from the stolen model. `chain` is several in a row."
    )
    tried_on: tuple[Suspect, ...] = Field(
        ("substitute", "null_model"),
        description="On which models: the substitute; the victim, for a thief who has its weights; the first null "
        "model, as the control.",
    )


class DetectionConfig(Config):
    """What is done to find the watermark."""

    methods: tuple[DetectionChoice, ...] = Field((), description="Detections.")
    tried_on: tuple[Suspect, ...] = Field(
        ("substitute", "null_model"), description="On which models, as `removal.tried_on`."
    )
    images: int = Field(1000, ge=2, description="Images of the thief's pool that whoever looks holds, at most.")


class VerificationConfig(Config):
    """How ownership is judged."""

    samples: int = Field(1000, ge=1, description="Held-out watermark samples (fewer if fewer distinct ones exist).")
    threshold: Fraction = Field(0.3, gt=0, lt=1, description="The paper's threshold on WSR.")
    significance: float = Field(0.01, gt=0, lt=1, description="Largest p-value at which theft is claimed.")
    reading: Literal["linear_probe", "linear_probe_cv", "prototype"] = Field(
        "linear_probe",
        description="How an encoder's features are read as classes: logistic regression with scikit-learn's penalty, "
        "with one that cross-validation on the labelled images chooses, or the nearest class mean.",
    )
    probe_images: int = Field(
        5000, ge=1, description="Labelled training images that the reading of an encoder is fitted on, at most."
    )
    null_models: int = Field(1, ge=1, description="Innocent models trained to learn the false-positive rate.")
    stolen_null_models: int = Field(
        0,
        ge=0,
        description="How many of them are stolen in the same way at the largest budget, as the control of the theft.",
    )

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> VerificationConfig:
        if self.stolen_null_models > self.null_models:
            raise ValueError(
                f"stolen_null_models={self.stolen_null_models} is more than null_models={self.null_models}; "
                "raise null_models"
            )
        return self


class ExperimentConfig(Config):
    """One experiment: a victim, a thief, and the proof."""

    seed: int = Field(0, ge=0, description="Seed of the thief and of the verification.")
    data: DataChoice = Field(default_factory=lambda: DataChoice(name="digits"), description="Dataset of the main task.")
    splits: SplitsConfig = Field(default_factory=SplitsConfig, description="Who sees which images.")
    victim: VictimConfig = Field(default_factory=VictimConfig, description="The watermarked model.")
    service: ServiceConfig = Field(default_factory=ServiceConfig, description="Its query API.")
    thief: ThiefConfig = Field(default_factory=ThiefConfig, description="The extraction attack.")
    removal: RemovalConfig = Field(default_factory=RemovalConfig, description="What is done to the stolen model.")
    detection: DetectionConfig = Field(default_factory=DetectionConfig, description="What is done to find the mark.")
    verification: VerificationConfig = Field(default_factory=VerificationConfig, description="The proof of ownership.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Where curves go.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="Share of the cluster per role.")
    storage: str = Field("mea_ray_results", description="Folder or URI (s3://, gs://, NFS path) for everything kept.")

    @property
    def encodes(self) -> bool:
        """Victim, null models and substitutes are encoders."""
        return self.victim.pretext.name != "none"


RESERVED_NAMES = frozenset({"artifacts", "calibration", "local"})
"""Folders of a storage that belong to no sweep."""
SpaceEntry = Mapping[str, Any]
Mode = Literal["max", "min"]


class SearchConfig(Config):
    """Which points of the space are tried."""

    name: Literal["grid", "random", "optuna"] = Field("grid", description="grid: every combination.")
    samples: int = Field(1, ge=1, description="random, optuna: points drawn (times the grid, for random).")
    metric: str | tuple[str, ...] = Field(
        "wsr",
        description="Metric of the last rung that optuna and asha look at; several: optuna seeks their front.",
    )
    mode: Mode | tuple[Mode, ...] = Field("max", description="Direction of `metric`; a list if that is one.")
    constraints: dict[str, float] = Field(
        default_factory=dict,
        description="{metric: largest value allowed}, e.g. {victim_gap: 0.02}: a victim at most 2 points less accurate "
        "than an innocent model. A trial beyond is infeasible.",
    )
    seed: int = Field(0, ge=0, description="Seed of the draw.")

    @property
    def objectives(self) -> tuple[tuple[str, Mode], ...]:
        """Metrics with their directions; the first is the one that asha looks at."""
        if isinstance(self.metric, tuple):
            return tuple(zip(self.metric, self.mode, strict=True))  # type: ignore[arg-type]
        return ((self.metric, self.mode),)  # type: ignore[return-value]

    @model_validator(mode="after")
    def _one_mode_for_each_metric(self) -> SearchConfig:
        metrics, modes = (1 if isinstance(v, str) else len(v) for v in (self.metric, self.mode))
        if isinstance(self.metric, str) != isinstance(self.mode, str) or metrics != modes or not metrics:
            raise ValueError(f"metric={self.metric!r} and mode={self.mode!r}: give one mode for each metric")
        return self


class SchedulerConfig(Config):
    """Which trials are stopped early."""

    name: Literal["fifo", "asha"] = Field("fifo", description="asha stops trials that lag at a rung of the budget.")
    grace_rungs: int = Field(1, ge=1, description="asha: rungs every trial may finish.")
    reduction_factor: float = Field(3.0, gt=1, description="asha: one in so many goes on.")


class SweepConfig(Config):
    """A sweep: a base experiment and a space over its config paths."""

    name: str = Field(
        "sweep",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="Names the results' folder; begins with a letter or digit.",
    )
    description: str = Field("", description="One paragraph for the report.")
    base: ExperimentConfig = Field(default_factory=ExperimentConfig, description="What all trials share.")
    space: dict[str, SpaceEntry] = Field(
        default_factory=dict,
        description="{config path: {grid: [...]} | {choice: [...]} | {uniform: [low, high]} | "
        "{loguniform: [low, high]}}",
    )
    seeds: int | tuple[int, ...] | None = Field(
        None,
        description="Repeats every point with so many seeds from 0 on, or with these; null leaves the base's seed.",
    )
    seeds_of: Literal["thief", "victim", "both"] = Field(
        "thief",
        description="What `seeds` vary: `seed` (thief, verification), `victim.seed` (key, victim: one is trained for "
        "each), or both together.",
    )
    search: SearchConfig = Field(default_factory=SearchConfig, description="Which points are tried.")
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig, description="Which trials are stopped early.")
    max_services: int = Field(1, ge=1, description="Victim services up at once; their resources are set aside.")
    max_failures: int = Field(3, ge=0, description="Times a trial is started again after its process died.")
    cluster_wait_s: float = Field(
        0.0, ge=0, description="Longest wait for a cluster with an autoscaler to grow; 0 takes it as it is."
    )

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value.lower() in RESERVED_NAMES:
            raise ValueError(f"the storage keeps other things under this name ({', '.join(sorted(RESERVED_NAMES))})")
        return value

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        listed = range(value) if isinstance(value, int) else value
        if listed is not None and (not listed or min(listed) < 0 or len(set(listed)) < len(listed)):
            raise ValueError("seeds must be 1 or more, or a list of different whole numbers from 0 on")
        return value

    @property
    def seed_points(self) -> list[dict[str, int]]:
        """Config paths and values of each seed that every point is repeated with."""
        paths = {"thief": ["seed"], "victim": ["victim.seed"], "both": ["seed", "victim.seed"]}[self.seeds_of]
        listed = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        return [{}] if listed is None else [dict.fromkeys(paths, seed) for seed in listed]


def build(model: type[ModelT], tree: Mapping[str, Any]) -> ModelT:
    """Check a tree against a config model.

    Raises:
        ConfigError: One message with every problem: the path, the value, the constraint, the nearest valid key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(problems(error, model))) from None


def load_experiment(path: str | Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment file (all defaults when None) and apply overrides."""
    tree = load_tree(path) if path is not None else {}
    return build(ExperimentConfig, merge(tree, dict(map(parse_override, overrides))))


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file and apply overrides: of the sweep's own keys, else of its base experiment.

    ``space.thief.model.name={grid: [...]}`` sets one axis: config paths are keys of the space, dots and all.
    """
    settings = dict(map(parse_override, overrides))
    axes = {key.removeprefix("space."): settings.pop(key) for key in list(settings) if key.startswith("space.")}
    own = set(SweepConfig.model_fields)
    tree = merge(load_tree(path), {k if k.split(".")[0] in own else f"base.{k}": v for k, v in settings.items()})
    if axes:
        space = tree.get("space") or {}
        if not isinstance(space, dict):
            raise ConfigError(f"space of {str(path)!r} holds {space!r}; it must map config paths to what is tried")
        tree["space"] = {**space, **axes}
    return build(SweepConfig, tree)


def write_yaml(config: Config, path: str | Path) -> None:
    """Write the resolved config, defaults filled in."""
    write_whole(Path(path), yaml.safe_dump(config.resolved(), sort_keys=False))
