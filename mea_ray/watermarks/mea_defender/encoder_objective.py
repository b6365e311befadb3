"""The objective of MEA-Defender for encoders: the pretext task's loss and the watermark's, from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.settings import Settings
from mea_ray.core.types import Images
from mea_ray.models.base import ImageModel
from mea_ray.training.objective import Batch, Objective, StepContext, merged
from mea_ray.training.views import Views
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mea_defender.objective import warmup_factor
from mea_ray.watermarks.mea_defender.settings import (
    OFF,
    LossSettings,
    UtilityLoss,
    VerificationLoss,
    Warmup,
    WeightedLoss,
)
from mea_ray.watermarks.mixing import Geometries, SourcePool

Distribution = Literal["softmax", "cosine"]
SHIFTED = Views(crop_scale=(0.7, 1.0), flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), grey=0.0)
"""How the owner's few images are augmented before they are mixed, so that they are not memorised."""
MIRRORED = Views(crop_scale=(1.0, 1.0), flip=0.5, jitter=(0.0, 0.0, 0.0, 0.0), grey=0.0)


class PretextTask(Protocol):
    """What the objective needs of a pretext task; ``mea_ray.pretext.base.Pretext`` is one."""

    encoded: int
    least_batch: int
    resumable: bool

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build the heads."""
        ...

    def start(self, context: StepContext) -> None:
        """Begin a training."""
        ...

    def start_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        ...

    def updated(self, model: nn.Module) -> None:
        """Follow the weights."""
        ...

    def memory(self) -> dict[str, Any]:
        """Return what the next epoch depends on."""
        ...

    def recall(self, memory: dict[str, Any]) -> None:
        """Take over what ``memory`` returned."""
        ...

    def views(self, batch: Batch) -> list[Tensor]:
        """Draw the views of each image."""
        ...

    def loss(self, features: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return the loss of the features of the first ``encoded`` views."""
        ...


class OwnerSamples(Settings):
    """The labelled images that the owner uses; of all others no label is read."""

    per_class: int = Field(
        500, ge=1, description="Labelled images of each of the three classes; all if there are fewer."
    )
    mirror: bool = Field(
        False, description="Mirror half of them when they are drawn; not where left and right matter (digits)."
    )


class EncoderCombinationLoss(WeightedLoss):
    """L_com, equation 6, in feature space. Only the mixes get a gradient."""

    weight: float = Field(0.1, ge=0, description=f"Weight of L_com (equation 6). {OFF}")
    distribution: Distribution = Field(
        "softmax",
        description="How a feature becomes a distribution, which the paper does not say: softmax is the KL of the "
        "softmax of features divided by `temperature`, cosine is 1 - cosine of the features.",
    )
    temperature: float = Field(0.1, gt=0, description="Temperature of the softmax.")


class EncoderEvasionLoss(WeightedLoss):
    """L_eva, equation 8, in feature space."""

    weight: float = Field(
        1.0,
        ge=0,
        description="Weight of L_eva (equation 8): a differently mixed sample is pulled to the source that it is "
        f"nearer to. {OFF}",
    )


class EncoderSamples(Settings):
    """What a training step draws beside the main batch."""

    mixes: int = Field(32, ge=1, description="Mixes per step, with as many clean samples of each of the three classes.")
    adverse: int = Field(16, ge=1, description="Differently mixed samples per step.")


class EncoderSettings(LossSettings):
    """Settings of ``EncoderObjective``; see the parameters of ``MeaDefenderEncoder`` of the same names."""

    utility: UtilityLoss
    com: EncoderCombinationLoss
    ver: VerificationLoss
    eva: EncoderEvasionLoss
    warmup: Warmup
    owner: OwnerSamples
    samples: EncoderSamples


class EncoderObjective(Objective):
    """The pretext task's loss, and L_com, L_ver, L_eva (equations 6 to 8) in feature space.

    A step's pass is [views; unlabelled images; mixes; clean samples of A, B and C; differently mixed samples]. Features
    are compared at length 1, after the mean of the unlabelled images was subtracted.

    Args:
        pretext: The utility loss.
        owned: uint8 images of the first source, the second source and the target class.
        combiner: Mixes the watermark samples.
        others: The other geometries.
        settings: Of the losses.
    """

    ORDER: ClassVar[tuple[str, ...]] = ("utility", "com", "ver", "eva")
    """Order in which the losses are added; floating-point sums depend on it."""

    def __init__(
        self,
        pretext: PretextTask,
        owned: Sequence[Images],
        combiner: Combiner,
        others: Sequence[Combiner],
        settings: EncoderSettings,
    ) -> None:
        super().__init__()
        self.pretext, self.combiner, self.others = pretext, combiner, Geometries(others)
        self.least_batch, self.resumable = pretext.least_batch, pretext.resumable
        self.owned = SourcePool(*owned, augment=False)
        self.settings: EncoderSettings = settings
        self.full_weights = settings.loss_weights()
        self.weights = dict(self.full_weights)
        self.on = {name for name, weight in self.weights.items() if weight > 0}

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Let the pretext task build its heads."""
        return self.pretext.attach(model, device)

    def start(self, context: StepContext) -> None:
        """Move what the losses need to the device."""
        super().start(context)
        self.pretext.start(context)
        self.owned.start(context)

    def start_epoch(self, epoch: int) -> None:
        """Set the watermark's weights for this epoch."""
        self.pretext.start_epoch(epoch)
        factor = warmup_factor(epoch, self.context.epochs, self.settings.warmup)
        self.weights = {n: w * (1 if n == "utility" else factor) for n, w in self.full_weights.items()}
        self.on = {name for name, weight in self.weights.items() if weight > 0}

    def updated(self, model: nn.Module) -> None:
        """Let a momentum encoder follow."""
        self.pretext.updated(model)

    def memory(self) -> dict[str, Any]:
        """Return whose turn it is among the geometries, and what the pretext task remembers."""
        return {"turn": self.others.turn, "pretext": self.pretext.memory()}

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class."""
        self.others.turn = memory["turn"]
        self.pretext.recall(memory["pretext"])

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return every enabled loss by its name."""
        views = self.pretext.views(batch) if "utility" in self.on else []
        encoded = [f"view{index}" for index, _ in enumerate(views[: self.pretext.encoded])]
        parts = dict(zip(encoded, views, strict=False))
        if self.on - {"utility"}:
            parts |= self.draw(batch)
        # A compiled network is no ImageModel, but has its methods.
        joined = cast(ImageModel, model).features(merged([*parts.values()])).float()
        features = dict(zip(parts, torch.split(joined, [len(part) for part in parts.values()]), strict=True))
        terms = {}
        if views:
            terms["utility"] = self.pretext.loss([features.pop(name) for name in encoded], views)
        if features:
            # What all images have in common would make all cosines 1 and hide the classes.
            common = features["plain"].detach().mean(0)
            directions = {name: F.normalize(part - common, dim=1) for name, part in features.items()}
            terms |= self.watermark_terms(directions)
        return {name: terms[name] for name in self.ORDER if name in terms and name in self.on}

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """Draw the images of the watermark's losses by name; ``plain`` are unlabelled images of the batch."""
        # Not augmented, as the images are that will be queried: views have another mean.
        return {"plain": batch.images[: 2 * self.settings.samples.mixes].float()} | self.draw_owned(vary=True)

    def draw_owned(self, *, vary: bool) -> dict[str, Tensor]:
        """Draw the owner's images and mix them: ``mixes``, ``first``, ``second``, ``target`` and ``adverse``."""
        samples, generator = self.settings.samples, self.context.generator
        mixes = samples.mixes
        first, second, target = (self.varied(each, vary) for each in self.owned.draw(mixes + samples.adverse))
        parts = {"mixes": self.combiner(first[:mixes], second[:mixes], generator)}
        parts |= {"first": first[:mixes], "second": second[:mixes], "target": target[:mixes]}
        if "eva" in self.on:
            parts["adverse"] = self.others(first[mixes:], second[mixes:], generator)
        return parts

    def varied(self, images: Tensor, vary: bool) -> Tensor:
        """Return float images, cropped at random if ``vary`` is set, and half of them mirrored if the owner says so."""
        images = SHIFTED(images.float(), self.context.generator) if vary else images.float()
        return MIRRORED(images, self.context.generator) if self.settings.owner.mirror else images

    def watermark_terms(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the watermark's losses, given features of length 1 by the names that ``draw`` gives."""
        com = self.settings.com
        terms = {
            "com": (
                combination(features["mixes"], features["first"], com.distribution, com.temperature)
                + combination(features["mixes"], features["second"], com.distribution, com.temperature)
            ),
            "ver": squared(features["mixes"], mean_direction(features["target"])),
        }
        if "adverse" in features:
            first, second = (mean_direction(features[name]) for name in ("first", "second"))
            terms["eva"] = evasion(features["adverse"], first, second)
        return terms


def mean_direction(features: Tensor) -> Tensor:
    """The mean of features of length 1, at length 1 and without gradient: float32 (D,) of (N, D)."""
    return F.normalize(features.detach().mean(0), dim=0)


def squared(features: Tensor, goal: Tensor) -> Tensor:
    """Mean squared distance of features (N, D) to a goal, (D,) or (N, D): 2 - 2 cosine for rows of length 1."""
    return (features - goal).square().sum(1).mean()


def evasion(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """L_eva (equation 8): mean squared distance of differently mixed samples (N, D) to the source that is nearer.

    The paper lets y_c be either source. Drawn at random, it would pull a sample to a point between the two.
    """
    nearer = (features.detach() @ torch.stack([first, second]).T).argmax(1)
    return squared(features, torch.stack([first, second])[nearer])


def combination(mixes: Tensor, sources: Tensor, kind: Distribution, temperature: float) -> Tensor:
    """L_com of one side (equation 6): mixes (N, D) towards the N sources that they were made of, held fixed.

    Args:
        mixes: Features of length 1, with their graph.
        sources: Features of length 1.
        kind: See ``EncoderCombinationLoss.distribution``.
        temperature: Of the softmax.
    """
    sources = sources.detach()
    if kind == "cosine":
        return 1 - F.cosine_similarity(mixes, sources, dim=1).mean()
    log_mixes, log_sources = (F.log_softmax(each / temperature, dim=1) for each in (mixes, sources))
    return F.kl_div(log_sources, log_mixes, reduction="batchmean", log_target=True)
