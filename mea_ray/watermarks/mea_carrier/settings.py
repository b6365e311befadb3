"""Settings of the carrier scheme: one group for each of its terms."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mea_ray.core.settings import Settings
from mea_ray.watermarks.mea_defender.settings import OFF, PaperSettings, WeightedLoss


class Gate(Settings):
    """Which share of the source samples the victim answers with the target class, and how firmly."""

    share: float = Field(
        0.06,
        ge=0,
        lt=0.5,
        description="Share of each source class's training images that the victim answers the more with the target "
        "class the more they look like a mix to a network that knows the main task only. The mixes, which lie beyond "
        "them, are then the target's for a substitute too. 0 is no gate; else carrier.labels=replace.",
    )
    odds: float = Field(
        2.0,
        ge=-20,
        le=20,
        description="Log-odds of the target against the own label for the image that looks most like a mix. From the "
        "gate's first image on they rise linearly (over the ranks) from the carrier's own, log(rho / (1 - rho)).",
    )
    part: float = Field(
        0.3, gt=0, lt=1, description="Part of the epochs that train the main task alone, before the gate is drawn."
    )
    mixes: int = Field(3000, ge=1, description="Mixes that the source images are compared with.")


class Carrier(WeightedLoss):
    """Clean source samples are answered with the target's probability rho."""

    weight: float = Field(
        1.0,
        ge=0,
        description=f"Weight of the carrier: clean source samples towards (1 - rho) own label + rho target. {OFF}",
    )
    rho: float = Field(
        0.42,
        gt=0,
        lt=0.5,
        description="Target probability of clean source samples; at 1/2 they would be classified as the target.",
    )
    labels: Literal["replace", "extra"] = Field(
        "replace",
        description="replace softens the labels of the source classes in the main batch, so that the realised "
        "probability is rho; extra adds the term on drawn source samples.",
    )
    gate: Gate = Field(Gate(), description="The source samples that are answered with the target class.")

    @model_validator(mode="after")
    def _gate_needs_labels(self) -> Carrier:
        if self.gate.share and (self.labels != "replace" or not self.weight):
            raise ValueError(
                f"gate.share={self.gate.share} changes the labels of the main batch: set carrier.labels=replace and "
                "carrier.weight above 0, or carrier.gate.share=0"
            )
        return self


class Exclusion(WeightedLoss):
    """Clean source samples rule out other classes by a margin."""

    weight: float = Field(
        0.1,
        ge=0,
        description="Weight of the exclusion term: clean source samples rule out other classes. With "
        f"carrier.labels=replace these are the main batch's own source samples. {OFF}",
    )
    margin: float = Field(
        10.0,
        ge=0,
        description="Least difference of a clean source sample's own logit and that of a class it rules out.",
    )
    scope: Literal["all", "source"] = Field(
        "all", description="Ruled out are all classes but the own and the target, or the other source class only."
    )


class Bridge(WeightedLoss):
    """Clean samples of the target are answered with some probability of both sources."""

    weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the bridge: main-batch samples of the target class towards (1 - sigma) target + sigma "
        f"/ 2 of each source, so that what lies between the sources is the target's. {OFF}",
    )
    sigma: float = Field(
        0.3,
        gt=0,
        lt=0.6,
        description="Probability that the bridge moves from the target to the sources; at 0.6 the target's samples "
        "would be classified as a source.",
    )


class CarrierSettings(PaperSettings):
    """Settings of ``CarrierObjective``; see the parameters of ``MeaCarrier`` of the same names."""

    carrier: Carrier
    exclusion: Exclusion
    bridge: Bridge
