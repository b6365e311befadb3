"""Settings of MEA-Defender: one group for each loss, one for the samples of a step, one for the weights' method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import RefusedSettings, Settings, warn_renamed
from mea_ray.watermarks.aggregators import AGGREGATORS
from mea_ray.watermarks.mea_defender.losses import ComDirection, ComGradient
from mea_ray.watermarks.mea_defender.weighting import Normalisation

OFF = "0 switches it off."
Warmup = Annotated[float, Field(ge=0, lt=1)]
"""Part of the epochs over which weights grow; see ``MeaDefender``."""


class WeightedLoss(Settings):
    """A loss with a weight."""

    weight: float = Field(1.0, ge=0, description=f"Weight of the loss. {OFF}")


class UtilityLoss(WeightedLoss):
    """L_util: the loss of the main task."""

    weight: float = Field(1.0, ge=0, description=f"Weight of L_util, the loss of the main task. {OFF}")


class CombinationLoss(WeightedLoss):
    """L_com, equation 6: a mix is answered as the two images that it was made of."""

    weight: float = Field(0.1, ge=0, description=f"Weight of L_com (equation 6). {OFF}")
    gradient: ComGradient = Field(
        "watermark",
        description="Which answers L_com moves: those of both sides (equation 6 as it stands), of the watermark "
        "samples alone (the authors' code), or of the sources alone. Moving the sources pulls them towards the "
        "target: their own accuracy suffers first.",
    )
    direction: ComDirection = Field(
        "watermark_source",
        description="watermark_source is KL(f(x_wm) || f(x_s)), as in equation 6; source_watermark is the other way.",
    )
    schedule: Literal["constant", "ramp", "pulse"] = Field(
        "constant",
        description="Weight of L_com over the epochs: constant, ramp (rising linearly to its value), or pulse (times "
        "`pulse` in every `period`-th epoch, after the authors' code).",
    )
    pulse: float = Field(6.0, ge=0, description="Factor of a pulse.")
    period: int = Field(10, ge=1, description="Epochs from one pulse to the next.")


class VerificationLoss(WeightedLoss):
    """L_ver, equation 7: a mix is classified as the target."""

    weight: float = Field(1.0, ge=0, description=f"Weight of L_ver (equation 7). {OFF}")


class EvasionLoss(WeightedLoss):
    """L_eva, equation 8: a mix in another geometry is classified as one of its sources."""

    weight: float = Field(1.0, ge=0, description=f"Weight of L_eva (equation 8). {OFF}")
    label: Literal["random", "soft"] = Field(
        "random", description="Each differently mixed sample gets one source label at random, or half of each (soft)."
    )


class StepSamples(Settings):
    """What a training step draws beside the main batch."""

    mixes: int = Field(
        16,
        ge=1,
        description="Watermark samples per step; losses on their sources add twice as many clean images.",
    )
    adverse: int = Field(8, ge=1, description="Differently mixed samples per step.")
    augment: bool = Field(True, description="Augment the source images as the main batch before they are mixed.")


class LossWeights(Settings):
    """How several losses become one gradient. A string is short for ``{method: ...}``."""

    method: str = Field(
        "fixed",
        description="fixed: the weighted sum. mgda: equation 9. Others: `mea-ray list aggregators`, or a class of "
        "yours, package.module:Class. The weights of the losses scale them before they are aggregated. mgda weighs a "
        "loss by about the square of its value, and L_com and L_eva cannot fall to 0: give them and L_ver small "
        "weights (on digits .003, .1 and .3), or the main task is not learnt.",
    )
    normalisation: Normalisation = Field(
        "loss+",
        description="mgda: what each gradient is divided by before the minimum-norm weights are found: its norm (l2), "
        "the loss (loss), their product (loss+), or nothing (none).",
    )
    smoothing: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="mgda: part of the last step's weights in this step's; 0 takes each step's own.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        given = {"method": value} if isinstance(value, str) else value
        if isinstance(given, Mapping) and given.get("method") == "min_norm":
            warn_renamed("weights", "min_norm", "mgda", "method=mgda")
            return {**given, "method": "mgda"}
        return given

    @field_validator("method")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value != "fixed":
            try:
                AGGREGATORS.check(value, {})
            except ConfigError as error:
                raise RefusedSettings(error) from None
        return value


class LossSettings(Settings):
    """Settings of an objective, some of which are losses.

    Raises:
        ConfigError: The weights of all losses are 0.
    """

    @model_validator(mode="after")
    def _trains_something(self) -> LossSettings:
        if not any(self.loss_weights().values()):
            raise ConfigError("all loss weights are 0, so nothing would be trained; give one of them a weight")
        return self

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each loss by its name."""
        groups = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: group.weight for name, group in groups.items() if isinstance(group, WeightedLoss)}


class PaperSettings(LossSettings):
    """Settings of ``MeaDefenderObjective``; see the parameters of ``MeaDefender`` of the same names."""

    utility: UtilityLoss
    com: CombinationLoss
    ver: VerificationLoss
    eva: EvasionLoss
    warmup: Warmup
    samples: StepSamples
    weights: LossWeights
