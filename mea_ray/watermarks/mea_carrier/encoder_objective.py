"""The objective of the carrier scheme for encoders: the paper's losses, carriers of cosines, and places in a plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images
from mea_ray.models.base import ImageModel
from mea_ray.training.objective import Batch
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mea_carrier.feature_plane import (
    Point,
    decoys_off_place,
    marked_share,
    off_place,
    plane_axes,
    rest_off_place,
)
from mea_ray.watermarks.mea_defender.encoder_objective import (
    EncoderObjective,
    EncoderSettings,
    PretextTask,
    mean_direction,
    squared,
)
from mea_ray.watermarks.mea_defender.settings import OFF, VerificationLoss, WeightedLoss

CLASSES = ("first", "second", "target")


def in_unit_circle(*coordinates: float) -> None:
    """Refuse a point that no feature of length 1 can be at.

    Raises:
        ValueError: The point is outside the unit circle.
    """
    if sum(coordinate**2 for coordinate in coordinates) > 1:
        raise ValueError("is outside the unit circle, where no feature of length 1 can be")


class CarrierVerificationLoss(VerificationLoss):
    """The mixes get the features of the target."""

    weight: float = Field(3.0, ge=0, description=f"Weight of L_ver (equation 7). {OFF}")
    loss: Literal["distance", "contrast", "both", "place"] = Field(
        "both",
        description="distance to the target's mean (the paper); contrast: cross-entropy of the target in a softmax "
        "over cosines with the three means; the sum of both; place: squared distance to the target's place in the "
        "plane. Where the three means are close to each other, a mix may be near the target's and nearer still to a "
        "source's; with contrast alone it may go to a class of which the owner has no labels.",
    )


class CosineCarrier(WeightedLoss):
    """Clean images of the sources and of the target keep given cosines with each other's means."""

    weight: float = Field(4.0, ge=0, description=f"Weight of the carrier's two terms. {OFF}")
    cosine: float = Field(
        0.9,
        gt=-1,
        lt=1,
        description="Least cosine of a clean source sample and the target class's mean, and the other way round.",
    )
    apart: float = Field(
        0.55, gt=-1, lt=1, description="Largest cosine of a clean source sample and the other source's mean."
    )


class OwnClass(WeightedLoss):
    """The three classes are kept apart."""

    weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the cross-entropy of clean samples' own class in a softmax over their cosines with the "
        f"three means, divided by `contrast_temperature`. {OFF}",
    )


class Place(WeightedLoss):
    """Clean samples of the three classes have places in a plane of feature space. All places are in the unit circle."""

    weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the term that brings clean samples of the three classes to their places: mean squared "
        f"distance of features of length 1. {OFF}",
    )
    source: Point = Field((0.55, 0.8), description="The first source is at (x, y), the second at (x, -y).")
    target: float = Field(0.9, description="The target class and the mixes are at (target, 0).")

    @field_validator("source", "target")
    @classmethod
    def _inside(cls, value: Any) -> Any:
        in_unit_circle(*value) if isinstance(value, tuple) else in_unit_circle(value)
        return value

    def of(self, name: str) -> Point:
        """Return the place of ``first``, ``second``, ``target`` or ``mixes``."""
        across, along = self.source
        return {"first": (across, along), "second": (across, -along)}.get(name, (self.target, 0.0))


class Rest(WeightedLoss):
    """All other images have a place in the plane."""

    weight: float = Field(
        0.0,
        ge=0,
        description=f"Weight of the term that brings all other images to their place (Kiryo et al., equation 6). {OFF}",
    )
    position: float = Field(-0.3, ge=-1, le=1, description="All other images, and decoys, are at (position, 0).")
    class_share: float = Field(
        0.1,
        gt=0,
        lt=1 / 3,
        description="Part of all images that each of the three classes has, 0.1 for ten equal ones.",
    )
    batch: int = Field(160, ge=1, description="Unlabelled images per step (at most the batch's).")


class Decoy(WeightedLoss):
    """Mixes of unlabelled pairs have the place of all other images."""

    weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the term that brings mixes of unlabelled pairs, `samples.mixes` per step, to the place "
        f"of all other images: a mix is not to look like the mark whatever it is made of. {OFF}",
    )
    half: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Part of the decoys in which one image is of a source class: neither source alone is to make the "
        "mark.",
    )


class CarrierEncoderSettings(EncoderSettings):
    """Settings of ``CarrierEncoderObjective``; see the parameters of ``MeaCarrierEncoder`` of the same names."""

    ver: CarrierVerificationLoss
    carrier: CosineCarrier
    own: OwnClass
    place: Place
    rest: Rest
    decoy: Decoy
    contrast_temperature: float = Field(gt=0)

    @property
    def uses_plane(self) -> bool:
        """Whether any loss is about places in the plane."""
        in_plane = any(group.weight > 0 for group in (self.place, self.rest, self.decoy))
        return in_plane or (self.ver.loss == "place" and self.ver.weight > 0)


class CarrierEncoderObjective(EncoderObjective):
    """The pretext task's loss, those of the paper, and those of the carrier and of places in a plane.

    Args:
        pretext: The utility loss.
        owned: uint8 images of the first source, the second source and the target class.
        combiner: Mixes the watermark samples.
        others: The other geometries.
        settings: Of the losses.
        seed: Of the plane's axes.
    """

    ORDER: ClassVar[tuple[str, ...]] = ("utility", "com", "ver", "own", "carrier", "eva", "place", "rest", "decoy")
    settings: CarrierEncoderSettings

    def __init__(
        self,
        pretext: PretextTask,
        owned: Sequence[Images],
        combiner: Combiner,
        others: Sequence[Combiner],
        settings: CarrierEncoderSettings,
        seed: int,
    ) -> None:
        super().__init__(pretext, owned, combiner, others, settings)
        self.seed = seed

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Let the pretext task build its heads, and draw the plane's axes.

        Raises:
            ConfigError: The model has no features.
        """
        heads = super().attach(model, device)
        if not isinstance(model, ImageModel):
            raise ConfigError(f"an encoder is a network with features(), not {type(model).__name__}")
        self.axes = plane_axes(model.feature_size, self.seed).to(device)
        return heads

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """Draw the images of the watermark's losses by name."""
        if not self.settings.uses_plane:
            return super().draw(batch)
        # Unlabelled images are varied if the owner's are, or the owner's samples could be recognised by that.
        vary = bool(torch.rand((), generator=self.context.generator) < 0.5)
        parts = {"plain": self.varied(batch.images[: self.settings.rest.batch], vary)} | self.draw_owned(vary=vary)
        if "decoy" in self.on:
            parts["decoys"] = self._decoys(parts)
        return parts

    def _decoys(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Mix unlabelled images with each other and, some of them, with an image of a source in its own position."""
        plain = parts["plain"][: self.settings.samples.mixes]
        first, second = plain.clone(), plain.roll(1, 0)
        known = round(len(plain) * self.settings.decoy.half) // 2
        first[:known] = parts["first"][:known]
        second[known : 2 * known] = parts["second"][:known]
        return self.combiner(first, second, self.context.generator)

    def watermark_terms(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the watermark's losses, given features of length 1 by the names that ``draw`` gives."""
        settings, temperature = self.settings, self.settings.contrast_temperature
        terms = super().watermark_terms(features)
        first, second, target = (mean_direction(features[name]) for name in CLASSES)
        means = torch.stack([first, second, target])
        if settings.ver.loss != "place":
            terms["ver"] = self._verification(features["mixes"], means)
        own = [contrast(features[name], means, label, temperature) for label, name in enumerate(CLASSES)]
        terms["own"] = torch.stack(own).mean()
        least, most = settings.carrier.cosine, settings.carrier.apart
        terms["carrier"] = (
            carrier(features["first"], [target], [second], least, most)
            + carrier(features["second"], [target], [first], least, most)
            + carrier(features["target"], [first, second], [], least, most)
        )
        return terms | (self._places(features) if settings.uses_plane else {})

    def _verification(self, mixes: Tensor, means: Tensor) -> Tensor:
        kind, terms = self.settings.ver.loss, []
        if kind in {"distance", "both"}:
            terms.append(squared(mixes, means[2]))
        if kind in {"contrast", "both"}:
            terms.append(contrast(mixes, means, 2, self.settings.contrast_temperature))
        return torch.stack(terms).sum()

    def _places(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of places in the plane."""
        place, rest = self.settings.place, self.settings.rest
        elsewhere = (rest.position, 0.0)
        off = [off_place(features[name], self.axes, place.of(name)) for name in CLASSES]
        terms = {
            "place": torch.stack(off).mean(),
            "rest": rest_off_place(features, self.axes, elsewhere, rest.class_share),
        }
        if "decoys" in features:
            marked = marked_share(rest.class_share, self.settings.decoy.half)
            terms["decoy"] = decoys_off_place(features, self.axes, elsewhere, marked)
        if self.settings.ver.loss == "place":
            terms["ver"] = off_place(features["mixes"], self.axes, place.of("mixes"))
        return terms


def contrast(features: Tensor, means: Tensor, own: int, temperature: float) -> Tensor:
    """Mean cross-entropy of a softmax over cosines with some means, divided by a temperature.

    Args:
        features: Rows of length 1, (N, D).
        means: Directions, (M, D), held fixed.
        own: Index of the right one.
        temperature: Of the softmax.
    """
    wanted = torch.full((len(features),), own, device=features.device)
    return F.cross_entropy(features @ means.T / temperature, wanted)


def carrier(samples: Tensor, near: Sequence[Tensor], far: Sequence[Tensor], least: float, most: float) -> Tensor:
    """Mean over clean samples s of one class: relu(least - cos(s, m)), m near, plus relu(cos(s, m) - most), m far.

    Args:
        samples: Features of length 1, (N, D).
        near: Mean directions, (D,), with which the samples' cosine should be at least ``least``.
        far: Mean directions, (D,), with which it should be at most ``most``.
        least: Least cosine.
        most: Largest cosine.
    """
    gaps = [F.relu(least - samples @ mean) for mean in near] + [F.relu(samples @ mean - most) for mean in far]
    return torch.stack(gaps).sum(0).mean()
