"""Settings of training: of every network, and of a substitute on a victim's answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mea_ray.config.components import Config
from mea_ray.core.settings import warn_renamed

Precision = Literal["auto", "float32", "tf32", "bfloat16", "float16"]
Compile = bool | Literal["reduce-overhead"]


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
    step_epochs: int = Field(10, ge=1, description="`step`: epochs between two reductions of the learning rate.")
    step_factor: float = Field(0.5, gt=0, le=1, description="`step`: factor by which the learning rate is multiplied.")
    warmup_fraction: float = Field(
        0.2, ge=0, lt=1, description="`one_cycle`: fraction of the steps with a rising learning rate."
    )
    augment: tuple[Literal["flip", "crop"], ...] = Field(
        ("flip", "crop"), description="Random horizontal flip; random crop after reflecting `crop_padding` pixels."
    )
    crop_padding: int = Field(4, ge=1, description="Pixels reflected at each side before the random crop.")
    gradient_clip: float | None = Field(None, gt=0, description="Maximum gradient norm; null for no clipping.")
    accumulate_steps: int = Field(1, ge=1, description="Batches whose gradients are summed for one update.")
    early_stop_patience: int | None = Field(
        None, ge=1, description="Epochs without a better validation accuracy before stopping; null never stops."
    )
    precision: Precision = Field(
        "auto",
        description="auto: bfloat16 autocast where the device computes it natively, else float16 on a GPU that has "
        "tensor cores, else float32. float16 scales the losses. tf32: float32 whose matrix products are rounded to 10 "
        "bits on a GPU; float32 rounds only those of convolutions there, as torch does.",
    )
    channels_last: bool | None = Field(None, description="Memory format; null chooses by device.")
    compile: Compile = Field(
        False, description="torch.compile the network; reduce-overhead: with CUDA graphs, for batches of fixed shapes."
    )
    stack: int = Field(
        1,
        ge=1,
        description="Maximum number of networks trained together as one stack, if several of one architecture have "
        "equally many images. 1 trains each separately; above, weights differ by rounding.",
    )


class LearningConfig(Config):
    """How a substitute learns from answers, whatever the attack: its loss, and the thief's own defences."""

    temperature: float | None = Field(
        None,
        gt=0,
        description="Temperature of answers and substitute; null takes the attack's own (distillation: 7, else 1).",
    )
    loss: Literal["kl", "soft_ce", "l1"] = Field(
        "kl", description="kl: KL(answer || substitute); soft_ce: cross-entropy with the answer; l1: of probabilities."
    )
    answers: Literal["unchanged", "argmax", "sharpen", "unlean"] = Field(
        "unchanged",
        description="What the thief does to answers before training. unchanged: nothing. argmax: keeps only the class. "
        "sharpen: raises probabilities to the power `sharpness`. unlean: finds classes whose answers lean "
        "towards another class, as a watermark's sources do, and reverts it; needs no query.",
    )
    sharpness: float = Field(2.0, gt=1, description="`sharpen`: power to which probabilities are raised.")
    scale_by_temperature_squared: bool = Field(
        False, description="Multiply the loss by temperature**2 (Hinton et al.); MEA-Defender's authors leave it out."
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the answered images held out for `early_stop_patience`; charged like the others.",
    )
    floor: float = Field(
        1e-12, gt=0, lt=1e-2, description="Minimum probability assumed for a class when the temperature is not 1."
    )
    mixing: Literal["none", "mixup", "cutmix"] = Field(
        "none", description="Train on mixtures of answered images: a defence against backdoors that costs no query."
    )
    mixing_alpha: float = Field(1.0, gt=0, description="Both parameters of the Beta distribution of the mixing ratio.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Label smoothing: fraction of each target spread over all classes."
    )
    statistics: Literal["pool", "none"] = Field(
        "pool", description="Substitute's normalisation: the thief's own pool's statistics, or none (raw [0, 1])."
    )

    @field_validator("answers", mode="before")
    @classmethod
    def _current_name(cls, value: Any) -> Any:
        if value != "as_told":
            return value
        warn_renamed("thief.learning.answers", "as_told", "unchanged", "thief.learning.answers=unchanged")
        return "unchanged"
