"""The objective of MEA-Defender for encoders: the pretext task's loss and those of the watermark, from one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.training.views import Views
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mea_defender.feature_plane import (
    Places,
    decoys_off_place,
    off_place,
    plane_axes,
    rest_off_place,
)
from mea_ray.watermarks.mea_defender.objective import Geometries, SourcePool, warmth

Distribution = Literal["softmax", "cosine"]
VerLoss = Literal["distance", "contrast", "both", "place"]
SHIFTED = Views(crop_scale=(0.7, 1.0), flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), grey=0.0)
"""How the owner's few samples are varied before they are mixed, so that they are not learnt by heart."""
MIRRORED = Views(crop_scale=(1.0, 1.0), flip=0.5, jitter=(0.0, 0.0, 0.0, 0.0), grey=0.0)


class Pretext(Protocol):
    """What is needed of a pretext task; ``mea_ray.pretext.base.Pretext`` is one."""

    encoded: int

    def views(self, batch: Batch) -> list[Tensor]:
        """Draw the views of each image."""
        ...

    def loss(self, features: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return the loss of the features of the first ``encoded`` views."""
        ...


@dataclass(frozen=True)
class EncoderEmbedding:
    """Settings of ``EncoderObjective``; ``MeaDefenderEncoder`` documents each one."""

    weights: Mapping[str, float] = field(default_factory=dict)
    watermark_batch: int = 32
    adverse_batch: int = 16
    carrier_cosine: float = 0.5
    carrier_apart: float = -0.2
    ver_loss: VerLoss = "distance"
    contrast_temperature: float = 0.1
    com_distribution: Distribution = "softmax"
    com_temperature: float = 0.1
    warmup: float = 0.0
    places: Places = field(default_factory=Places)
    rest_batch: int = 160
    mirror: bool = False
    decoy_half: float = 0.0

    def __post_init__(self) -> None:
        """Check what nobody else does."""
        if not 0 <= self.decoy_half <= 1:
            raise ConfigError(f"decoy_half={self.decoy_half} is a part of the decoys, in [0, 1]")

    @property
    def placed(self) -> bool:
        """Whether any loss is about places in the plane."""
        in_plane = any(self.weights.get(term, 0) > 0 for term in ("place", "rest", "decoy"))
        return in_plane or (self.ver_loss == "place" and self.weights.get("ver", 0) > 0)


class EncoderObjective(Objective):
    """The pretext task's loss, L_com, L_ver, L_eva (equations 6 to 8), the carrier and places terms.

    A step's pass is [views; some images as they are; mixes; clean samples of A, B and C; differently mixed samples].

    Args:
        pretext: The utility loss; a ``Pretext`` that is an ``Objective``.
        owned: uint8 images of the first source, the second source and the target class.
        combiner: Mixes the watermark samples.
        others: The other geometries.
        settings: Weights, batch sizes and switches.
        seed: Of the plane's axes.
    """

    def __init__(
        self,
        pretext: Any,
        owned: Sequence[Images],
        combiner: Combiner,
        others: Sequence[Combiner],
        settings: EncoderEmbedding,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pretext, self.combiner, self.others = pretext, combiner, Geometries(others)
        self.least_batch = pretext.least_batch
        self.owned = SourcePool(*owned, augment=False)
        self.settings, self.seed = settings, seed
        self.weights = dict(settings.weights)
        self.on = {name for name, weight in settings.weights.items() if weight > 0}

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Let the pretext task build its heads."""
        heads: list[nn.Parameter] = self.pretext.attach(model, device)
        self.axes = plane_axes(int(model.feature_size), self.seed).to(device)  # type: ignore[arg-type]
        return heads

    def start(self, context: StepContext) -> None:
        """Move what the losses need to the device."""
        super().start(context)
        self.pretext.start(context)
        self.owned.start(context)

    def start_epoch(self, epoch: int) -> None:
        """Set the watermark's weights for this epoch."""
        self.pretext.start_epoch(epoch)
        warm = warmth(epoch, self.context.epochs, self.settings.warmup)
        self.weights = {n: w * (1 if n == "utility" else warm) for n, w in self.settings.weights.items()}
        self.on = {name for name, weight in self.weights.items() if weight > 0}

    def updated(self, model: nn.Module) -> None:
        """Let a momentum encoder follow."""
        self.pretext.updated(model)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return every switched-on loss by its name."""
        views = self.pretext.views(batch) if "utility" in self.on else []
        parts = {f"view{index}": view for index, view in enumerate(views[: self.pretext.encoded])}
        if self.on - {"utility"}:
            # As they are, for so are the images that will be asked: the mean of views is another.
            plain, vary = batch.images[: 2 * self.settings.watermark_batch].float(), True
            if self.settings.placed:
                # Varied if the owner's are, or that would tell the owner's samples from all other images.
                vary = bool(torch.rand((), generator=self.context.generator) < 0.5)
                plain = self._varied(batch.images[: self.settings.rest_batch], vary)
            parts |= {"plain": plain} | self._marks(vary)
            if "decoy" in self.on:
                parts["decoys"] = self._decoys(parts)
        encoded = model.features(merged([*parts.values()])).float().split([len(part) for part in parts.values()])  # type: ignore[operator]
        features = dict(zip(parts, encoded, strict=True))
        terms = {}
        seen = [features.pop(name) for name in list(parts)[: self.pretext.encoded] if views]
        if views:
            terms["utility"] = self.pretext.loss(seen, views)
        if features:
            # What all images have in common would make all cosines 1 and hide the classes.
            common = features["plain"].detach().mean(0)
            terms |= self._watermark({name: F.normalize(part - common, dim=1) for name, part in features.items()})
        return {name: term for name, term in terms.items() if name in self.on}

    def _varied(self, images: Tensor, vary: bool) -> Tensor:
        """Return float images, varied or as they are, half of them mirrored if asked."""
        images = SHIFTED(images.float(), self.context.generator) if vary else images.float()
        return MIRRORED(images, self.context.generator) if self.settings.mirror else images

    def _marks(self, vary: bool = True) -> dict[str, Tensor]:
        """Draw the images of the watermark's losses."""
        mixes, adverse, generator = self.settings.watermark_batch, self.settings.adverse_batch, self.context.generator
        first, second, target = (self._varied(each, vary) for each in self.owned.draw(mixes + adverse))
        parts = {"mixes": self.combiner(first[:mixes], second[:mixes], generator)}
        parts |= {"first": first[:mixes], "second": second[:mixes], "target": target[:mixes]}
        if "eva" in self.on:
            parts["adverse"] = self.others(first[mixes:], second[mixes:], generator)
        return parts

    def _decoys(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Mix unlabelled images with each other and, some of them, with an image of a source in its own place."""
        plain = parts["plain"][: self.settings.watermark_batch]
        first, second = plain.clone(), plain.roll(1, 0)
        known = round(len(plain) * self.settings.decoy_half) // 2
        first[:known] = parts["first"][:known]
        second[known : 2 * known] = parts["second"][:known]
        return self.combiner(first, second, self.context.generator)

    def _watermark(self, said: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of features that were centred and brought to length 1."""
        settings = self.settings
        first, second, target = (mean_direction(said[name]) for name in ("first", "second", "target"))
        means, heat = torch.stack([first, second, target]), settings.contrast_temperature
        terms = {
            "com": (
                combination(said["mixes"], said["first"], settings.com_distribution, settings.com_temperature)
                + combination(said["mixes"], said["second"], settings.com_distribution, settings.com_temperature)
            ),
            "ver": (
                (squared(said["mixes"], target) if settings.ver_loss in {"distance", "both"} else 0)
                + (contrast(said["mixes"], means, 2, heat) if settings.ver_loss in {"contrast", "both"} else 0)
            ),
            "own": torch.stack(
                [contrast(said[name], means, own, heat) for own, name in enumerate(("first", "second", "target"))]
            ).mean(),
            "carrier": (
                carrier(said["first"], [target], [second], settings.carrier_cosine, settings.carrier_apart)
                + carrier(said["second"], [target], [first], settings.carrier_cosine, settings.carrier_apart)
                + carrier(said["target"], [first, second], [], settings.carrier_cosine, settings.carrier_apart)
            ),
        }
        if "adverse" in said:
            terms["eva"] = evasion(said["adverse"], first, second)
        return terms | (self._places(said) if settings.placed else {})

    def _places(self, said: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of places in the plane."""
        settings, places = self.settings, self.settings.places
        off = {name: off_place(said[name], self.axes, places.of(name)) for name in ("first", "second", "target")}
        terms = {
            "place": torch.stack([*off.values()]).mean(),
            "rest": rest_off_place(said, self.axes, places.of("rest"), places.share),
        }
        if "decoys" in said:
            terms["decoy"] = decoys_off_place(said, self.axes, places.of("rest"), places.marked(settings.decoy_half))
        if settings.ver_loss == "place":
            terms["ver"] = off_place(said["mixes"], self.axes, places.of("mixes"))
        return terms


def mean_direction(features: Tensor) -> Tensor:
    """The mean of features of length 1, at length 1 and without gradient: float32 (D,) of (N, D)."""
    return F.normalize(features.detach().mean(0), dim=0)


def squared(features: Tensor, goal: Tensor) -> Tensor:
    """Mean squared distance of features (N, D) to a goal, (D,) or (N, D): 2 - 2 cosine for rows of length 1."""
    return (features - goal).square().sum(1).mean()


def contrast(features: Tensor, means: Tensor, own: int, temperature: float) -> Tensor:
    """Mean cross-entropy of a softmax over cosines with some means, divided by a temperature.

    Args:
        features: Rows of length 1, (N, D).
        means: Directions, (M, D), held fixed.
        own: Which of them is the right one.
        temperature: Of the softmax.
    """
    wanted = torch.full((len(features),), own, device=features.device)
    return F.cross_entropy(features @ means.T / temperature, wanted)


def evasion(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """L_eva (equation 8): mean squared distance of differently mixed samples (N, D) to the source that is nearer.

    The paper lets y_c be either source. Drawn at random it would pull a sample to what lies between the two, and that
    is where the carrier puts the target.
    """
    nearer = (features.detach() @ torch.stack([first, second]).T).argmax(1)
    return squared(features, torch.stack([first, second])[nearer])


def combination(mixes: Tensor, sources: Tensor, kind: Distribution, temperature: float) -> Tensor:
    """L_com of one side (equation 6): mixes (N, D) towards the N sources that they were made of, which stay.

    Args:
        mixes: Features of length 1, with their graph.
        sources: Features of length 1.
        kind: See ``MeaDefenderEncoder.com_distribution``.
        temperature: Of the softmax.
    """
    sources = sources.detach()
    if kind == "cosine":
        return 1 - F.cosine_similarity(mixes, sources, dim=1).mean()
    log_mixes, log_sources = (F.log_softmax(each / temperature, dim=1) for each in (mixes, sources))
    return F.kl_div(log_sources, log_mixes, reduction="batchmean", log_target=True)


def carrier(samples: Tensor, near: Sequence[Tensor], far: Sequence[Tensor], least: float, most: float) -> Tensor:
    """Mean over clean samples s of one class: relu(least - cos(s, m)), m near, plus relu(cos(s, m) - most), m far.

    Args:
        samples: Features of length 1, (N, D).
        near: Mean directions, (D,), that the samples are to have at least the cosine ``least`` with.
        far: Mean directions that they are to have at most the cosine ``most`` with.
        least: Least cosine.
        most: Largest cosine.
    """
    gaps = [F.relu(least - samples @ mean) for mean in near] + [F.relu(samples @ mean - most) for mean in far]
    return torch.stack(gaps).sum(0).mean()
