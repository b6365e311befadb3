"""The settings of one experiment: a tree of frozen groups, read from YAML, overridden by ``key.path=value``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mea_ray.config.class_names import with_class_indices
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
from mea_ray.config.running import BlackBoxConfig, ResourcesConfig, ServiceConfig, TrackingConfig
from mea_ray.config.training import LearningConfig, TrainingConfig
from mea_ray.core.settings import InvalidSettings, RefusedSettings
from mea_ray.core.types import StatisticName

Suspect = Literal["substitute", "victim", "null_model"]


class SplitsConfig(Config):
    """Split of the images among owner, thief and verifier."""

    validation_fraction: float = Field(
        0.05, gt=0, lt=0.5, description="Fraction of train for early stopping of the victim."
    )
    verification_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Fraction of test for watermark samples (at least 36 images of a class, at most half of them).",
    )
    thief_pool: Literal["train", "disjoint"] | DataChoice = Field(
        "train",
        description="The thief's images: train, the victim's own training images (the paper's setting); disjoint, a "
        "separate part of train; or another dataset.",
    )
    held_out: Literal["test", "validation"] = Field(
        "test",
        description="Images on which models are judged: test, or, while settings are being chosen, validation, cut "
        "in two like test. The pool `train` then excludes them.",
    )
    disjoint_fraction: float = Field(
        0.5, gt=0, lt=1, description="Fraction of train for the thief with thief_pool=disjoint."
    )

    @field_validator("thief_pool", mode="before")
    @classmethod
    def _pool(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in {"train", "disjoint"}:
            return DataChoice.model_validate(value)
        return DataChoice.model_validate(value) if isinstance(value, Mapping) else value


class VictimConfig(Config):
    """The model that is sold as an API. Everything here, with `data` and `splits`, determines the artifact's name."""

    model: ModelChoice = Field(default_factory=lambda: ModelChoice(name="vgg_like"), description="Architecture.")
    pretext: PretextChoice = Field(
        default_factory=lambda: PretextChoice(name="none"),
        description="Training signal of the main task: labels (none), or views without labels. Then victim, null "
        "models and substitutes are encoders, and the API answers with embeddings.",
    )
    watermark: WatermarkChoice = Field(
        default_factory=lambda: WatermarkChoice(name="mea_defender"), description="Watermark scheme."
    )
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="Training of the victim and of the null models."
    )
    weights: str | None = Field(
        None,
        description="File of a trained classifier (safetensors, or a state dict), into which the mark is embedded by "
        "fine-tuning, with `victim.training`.",
    )
    null_training: TrainingConfig | None = Field(
        None,
        description="Training of the null models where it differs. They never start from `victim.weights`, so they "
        "need as many epochs as training from scratch.",
    )
    seed: int = Field(0, ge=0, description="Seed of the initial weights, the splits and the batches.")
    insecure_key_from_seed: bool = Field(
        False,
        description="Derive the key from `seed`, so that an experiment can be repeated exactly. Anyone with the "
        "config can then rebuild the key: for research only. Otherwise its 256-bit seed comes from the system, "
        "and the key is stored under `keys/` in the storage, mode 600.",
    )


class ThiefConfig(Config):
    """The thief: an attack, its query budgets, and the substitute that it trains."""

    attack: AttackChoice = Field(
        default_factory=lambda: AttackChoice(name="distillation"), description="Extraction attack."
    )
    budgets: tuple[int, ...] = Field(
        (1000,),
        min_length=1,
        description="Query budgets in images, ascending; one newly trained substitute per budget, with nested "
        "transfer sets.",
    )
    accounts: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Number of accounts of the thief; images and budget are distributed over them round-robin.",
    )
    blackbox: BlackBoxConfig | None = Field(
        None,
        description="The API to steal from, if not this experiment's `service`; the victim is still trained.",
    )
    model: ModelChoice = Field(
        default_factory=lambda: ModelChoice(name="vgg_like"), description="Architecture of the substitute."
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Training of each substitute.")
    learning: LearningConfig = Field(
        default_factory=LearningConfig, description="How each substitute learns from the answers."
    )

    @field_validator("budgets")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(b < 1 for b in value) or any(a >= b for a, b in zip(value, value[1:], strict=False)):
            raise ValueError(f"budgets must be positive and strictly ascending, got {list(value)}")
        return value


class RemovalConfig(Config):
    """Attempts to remove the watermark from the model stolen with the largest budget."""

    methods: tuple[RemovalChoice, ...] = Field(
        (), description="Removals; each starts from the stolen model. `chain` applies several in a row."
    )
    tried_on: tuple[Suspect, ...] = Field(
        ("substitute", "null_model"),
        description="Models to try removals on: the substitute; the victim, for a thief who has its weights; the "
        "first null model, as the control.",
    )


class DetectionConfig(Config):
    """Attempts to detect the watermark."""

    methods: tuple[DetectionChoice, ...] = Field((), description="Detections.")
    tried_on: tuple[Suspect, ...] = Field(
        ("substitute", "null_model"), description="Models to try detections on, as `removal.tried_on`."
    )
    images: int = Field(1000, ge=2, description="Maximum number of images of the thief's pool for a detection.")


class ShadowConfig(Config):
    """The owner's models that choose the key's samples; they are never controls of a verdict."""

    thieves: int = Field(2, ge=1, le=16, description="Number of substitutes of the victim, trained by its owner.")
    null_models: int = Field(2, ge=1, le=16, description="Number of innocent models, trained only for the choice.")
    models: tuple[ModelChoice, ...] = Field(
        (), max_length=8, description="Networks of the shadow thieves, round-robin; empty means the victim's own."
    )
    candidates: int = Field(
        2000, ge=30, description="Number of candidate samples, mixed from the owner's validation images."
    )
    agreement: float = Field(
        0.5, gt=0, le=1, description="Minimum fraction of the shadow thieves that must know a sample."
    )


class VerificationConfig(Config):
    """How ownership is judged."""

    version: ClassVar[int] = 2  # 2: the statistic is the scheme's own
    samples: int = Field(1000, ge=1, description="Held-out watermark samples (fewer if fewer distinct ones exist).")
    threshold: float = Field(0.3, gt=0, lt=1, description="The paper's threshold on WSR.")
    significance: float = Field(0.01, gt=0, lt=1, description="Largest p-value at which theft is claimed.")
    statistic: Literal["auto"] | StatisticName = Field(
        "auto",
        description="Statistic by which models and keys are ranked. auto: lean for mea_carrier, whose mark is in the "
        "answers to clean images, log_probability for other mixes, wsr for schemes with their own test. `mea-ray "
        "calibrate` measures all of them.",
    )
    filter: Literal["auto", "none", "shadow"] = Field(
        "auto",
        description="Samples of the key on which WSR and log_probability are measured. none: all. shadow: those that "
        "the victim and shadow thieves know and null models do not, chosen before any suspect is known, and part "
        "of the key. auto: shadow for deeptracer, none for others.",
    )
    shadow: ShadowConfig = Field(default_factory=ShadowConfig, description="Models that choose, for `filter: shadow`.")
    commitment: Literal["simulated", "required"] = Field(
        "simulated",
        description="Whether the key was committed to before the theft. simulated: assumed, since the experiment "
        "fixes the key before the theft. required: only with a time stamp from `mea-ray commit`.",
    )
    reading: Literal["linear_probe", "linear_probe_cv", "prototype"] = Field(
        "linear_probe",
        description="How an encoder's features are mapped to classes: logistic regression with scikit-learn's "
        "penalty, with a cross-validated penalty, or the nearest class mean.",
    )
    probe_images: int = Field(
        5000, ge=1, description="Maximum number of labelled training images for fitting the reading of an encoder."
    )
    null_models: int = Field(1, ge=1, le=1000, description="Number of innocent models among which a suspect is ranked.")
    stolen_null_models: int = Field(
        0,
        ge=0,
        le=1000,
        description="Number of null models that are stolen in the same way with each budget, as controls for the "
        "theft.",
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
    splits: SplitsConfig = Field(
        default_factory=SplitsConfig, description="Split of the images among owner, thief and verifier."
    )
    victim: VictimConfig = Field(default_factory=VictimConfig, description="The watermarked model.")
    service: ServiceConfig = Field(default_factory=ServiceConfig, description="Its query API.")
    thief: ThiefConfig = Field(default_factory=ThiefConfig, description="The extraction attack.")
    removal: RemovalConfig = Field(
        default_factory=RemovalConfig, description="Watermark removal from the stolen model."
    )
    detection: DetectionConfig = Field(default_factory=DetectionConfig, description="Watermark detection.")
    verification: VerificationConfig = Field(default_factory=VerificationConfig, description="The proof of ownership.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Experiment tracking.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="Cluster resources per role.")
    storage: str = Field(
        "mea_ray_results", description="Folder or URI (s3://, gs://, NFS path) for results and artifacts."
    )

    @field_validator("storage")
    @classmethod
    def _no_blank_storage(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("storage is empty; give a folder or URI, e.g. storage=mea_ray_results")
        return value

    @model_validator(mode="after")
    def _with_class_indices(self) -> ExperimentConfig:
        try:
            for section in ("victim", "thief", "removal", "detection"):
                # Frozen for all but its own validation.
                self.__dict__[section] = with_class_indices(getattr(self, section), self.data, section)
        except InvalidSettings as error:
            raise RefusedSettings(error) from None
        return self

    @property
    def encodes(self) -> bool:
        """Whether victim, null models and substitutes are encoders."""
        return self.victim.pretext.name != "none"
