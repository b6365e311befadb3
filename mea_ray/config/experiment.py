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
    """Who sees which images."""

    validation_fraction: float = Field(0.05, gt=0, lt=0.5, description="Of train: early stop of the victim.")
    verification_fraction: float = Field(
        0.2, gt=0, lt=1, description="Of test (36 of a class at least, up to half of it): for watermark samples."
    )
    thief_pool: Literal["train", "disjoint"] | DataChoice = Field(
        "train",
        description="The thief's images: the victim's own training images (the paper's setting), a disjoint part of "
        "train, or another dataset.",
    )
    held_out: Literal["test", "validation"] = Field(
        "test",
        description="Images that models are judged on: test, or, while settings are chosen, validation, cut in two as "
        "test is. The pool `train` is then without them.",
    )
    disjoint_fraction: float = Field(0.5, gt=0, lt=1, description="Of train: the thief's part under `disjoint`.")

    @field_validator("thief_pool", mode="before")
    @classmethod
    def _pool(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in {"train", "disjoint"}:
            return DataChoice.model_validate(value)
        return DataChoice.model_validate(value) if isinstance(value, Mapping) else value


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
    weights: str | None = Field(
        None,
        description="File of a classifier that was trained already (safetensors, or a state dict): the mark is put "
        "into it by fine-tuning, with `victim.training`.",
    )
    null_training: TrainingConfig | None = Field(
        None,
        description="Training of the null models where it differs: they never start from `victim.weights`, so fewer "
        "epochs than a training from scratch takes would make them poor.",
    )
    seed: int = Field(0, ge=0, description="Seed of the initial weights, the splits and the batches.")
    insecure_key_from_seed: bool = Field(
        False,
        description="Derive the key from `seed`, so that an experiment can be repeated exactly. Anyone with the config "
        "can then rebuild the key: for science only. Otherwise its seed comes from the system, 256 bits, and the key "
        "is kept in the storage under `keys/`, mode 600.",
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
        1,
        ge=1,
        le=10_000,
        description="Clients that the thief registers as; images and budget are dealt out over them in turn.",
    )
    blackbox: BlackBoxConfig | None = Field(
        None,
        description="The API to steal from, if not this experiment's `service`; the victim is still its own.",
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
    images: int = Field(1000, ge=2, description="Images of the thief's pool that a detection may use, at most.")


class ShadowConfig(Config):
    """The owner's models that choose the key's samples; the controls of a verdict are others."""

    thieves: int = Field(2, ge=1, le=16, description="Substitutes of the victim, trained by its owner.")
    null_models: int = Field(2, ge=1, le=16, description="Innocent models, trained for the choice alone.")
    models: tuple[ModelChoice, ...] = Field(
        (), max_length=8, description="Networks of the shadow thieves in turn; empty is the victim's own."
    )
    candidates: int = Field(2000, ge=30, description="Samples of the owner's validation images that are chosen from.")
    agreement: float = Field(0.5, gt=0, le=1, description="Least share of the shadow thieves that knows a sample.")


class VerificationConfig(Config):
    """How ownership is judged."""

    version: ClassVar[int] = 2  # 2: the statistic is the scheme's own
    samples: int = Field(1000, ge=1, description="Held-out watermark samples (fewer if fewer distinct ones exist).")
    threshold: float = Field(0.3, gt=0, lt=1, description="The paper's threshold on WSR.")
    significance: float = Field(0.01, gt=0, lt=1, description="Largest p-value at which theft is claimed.")
    statistic: Literal["auto"] | StatisticName = Field(
        "auto",
        description="What models and keys are ranked by. auto: lean for mea_carrier, whose mark is in the answers to "
        "clean images, log_probability for other mixes, wsr for schemes with a test of their own. `mea-ray calibrate` "
        "measures all of them.",
    )
    filter: Literal["auto", "none", "shadow"] = Field(
        "auto",
        description="Which samples of the key WSR and log_probability are read on. none: all. shadow: those that the "
        "victim and shadow thieves know and null models do not, chosen before any suspect is seen, and part of the "
        "key. auto: shadow for deeptracer, none for others.",
    )
    shadow: ShadowConfig = Field(default_factory=ShadowConfig, description="`filter: shadow`: the models that choose.")
    commitment: Literal["simulated", "required"] = Field(
        "simulated",
        description="Whether the key was committed to before the theft: taken for granted, as the experiment fixes it "
        "before it steals (simulated), or only if a time stamp from `mea-ray commit` says so (required).",
    )
    reading: Literal["linear_probe", "linear_probe_cv", "prototype"] = Field(
        "linear_probe",
        description="How an encoder's features are read as classes: logistic regression with scikit-learn's penalty, "
        "with one that cross-validation on the labelled images chooses, or the nearest class mean.",
    )
    probe_images: int = Field(
        5000, ge=1, description="Labelled training images that the reading of an encoder is fitted on, at most."
    )
    null_models: int = Field(1, ge=1, le=1000, description="Innocent models that a suspect is ranked among.")
    stolen_null_models: int = Field(
        0,
        ge=0,
        le=1000,
        description="How many of them are stolen in the same way with each budget, as the control of the theft.",
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
        """Victim, null models and substitutes are encoders."""
        return self.victim.pretext.name != "none"
