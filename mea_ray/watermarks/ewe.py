"""The Entangled Watermark (EWE): trigger and target share a representation, so that neither is copied alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.settings import Settings
from mea_ray.core.types import Images, ImageSet
from mea_ray.training.objective import Batch, CrossEntropy, Objective
from mea_ray.watermarks.base import Key, Stage, Watermark, WatermarkSamples, require_key
from mea_ray.watermarks.patches import check_label, check_patch, corner_of, patch_samples

TINY = 1e-5
"""What the published code adds to the denominator and inside of the logarithm."""


class SquareTrigger(Settings):
    """The square on images of the source class, and the refinement of their pixels."""

    size: int = Field(3, ge=1, description="Side of the square, in pixels; 3 in the published code.")
    place: Literal["least", "largest"] = Field(
        "least",
        description="The square goes where the sum of the SNNL's gradient is least (the published code) or largest.",
    )
    refine_steps: int = Field(
        10,
        ge=0,
        description="Signed steps on the triggers' pixels towards a larger SNNL, and as many away from the target.",
    )
    refine_size: float = Field(0.01, ge=0, description="Size of a step, in units of [0, 1].")


class Entanglement(Settings):
    """The soft nearest neighbour loss (SNNL) of trigger and target."""

    kappa: float = Field(
        1e5 / 128,
        ge=0,
        description="Weight of the SNNL beside the mean cross-entropy. Published for CIFAR: 1e5 beside the sum over a "
        "batch of 128.",
    )
    temperature: float = Field(1.0, gt=0, description="Initial temperature T; distances are divided by 100 / T.")
    temperature_learning_rate: float = Field(
        0.1,
        ge=0,
        description="Step of the temperatures' descent on the SNNL after each batch of the watermark; 0 leaves them.",
    )
    layers: int = Field(
        3, ge=1, description="Last convolutions and linear layers before the logits whose outputs count."
    )


class EntangledWatermark(Watermark):
    """Cross-entropy minus kappa times the soft nearest neighbour loss (SNNL) of trigger and target, in alternation.

    Choose it as the baseline that ties the trigger to the task's own features.

    First the main task alone. Then the trigger is found: images of the source class get a white square at a place
    that the SNNL's gradient chooses (``trigger.place``), and their pixels are refined by signed steps. Then every
    ``ratio`` batches of the task are followed by one of half triggers and half target images, all labelled as the
    target. Its loss is CE - kappa * sum over layers of SNNL(trigger or target, temperature): a large SNNL means that
    the two are entangled. After each such batch the temperatures take a step down the SNNL, as in the published code.

    Verified on held-out images of the source class with the same square. The published code verifies with the triggers
    that it trained on, and for CIFAR-10 takes triggers from another dataset (``out``), which is not implemented here.

    Args:
        source_class: Class whose images carry the square.
        target_class: Label that they get.
        trigger: The square, and the refinement of the pixels.
        snnl: The loss that entangles trigger and target.
        ratio: Batches of the task for each of the watermark.
        plain_part: Part of the epochs that train the task alone.

    References:
        Jia et al., Entangled Watermarks as a Defense against Model Extraction, USENIX Security 2021,
        https://arxiv.org/abs/2002.12200, equations 1 to 3; Frosst et al., SNNL, 2019, https://arxiv.org/abs/1902.01889.

    Raises:
        ConfigError: Both classes are the same.
    """

    name = "ewe"
    version: ClassVar[int] = 2
    renamed: ClassVar[Mapping[str, str]] = {
        **{name: f"trigger.{name}" for name in ("size", "place", "refine_steps", "refine_size")},
        **{name: f"snnl.{name}" for name in ("kappa", "temperature", "temperature_learning_rate", "layers")},
    }

    def __init__(
        self,
        *,
        source_class: ClassLabel = 1,
        target_class: ClassLabel = 0,
        trigger: SquareTrigger = SquareTrigger(),
        snnl: Entanglement = Entanglement(),
        ratio: Annotated[int, Field(ge=1)] = 4,
        plain_part: Annotated[float, Field(gt=0, lt=1)] = 0.7,
    ) -> None:
        if source_class == target_class:
            raise ConfigError(f"source_class={source_class} must differ from target_class")
        self.source_class, self.target_class = source_class, target_class
        self.trigger, self.snnl = trigger, snnl
        self.ratio, self.plain_part = ratio, plain_part

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Check the classes; where the square goes is found by the victim's training (``learned``)."""
        check_patch(self.trigger.size, (0, 0), train.shape)
        check_label("source_class", self.source_class, train)
        check_label("target_class", self.target_class, train)
        settings = {"shape": list(train.shape), "corner": [0, 0]}
        # The published code sets the first channel only; in a colour image that is red where it was bright already.
        tensors = {"pattern": np.ones((train.shape[0], self.trigger.size, self.trigger.size), np.float32)}
        return Key(self.name, (self.source_class, -1), self.target_class, derive(seed, "key"), settings, tensors)

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return two stages: the task alone, then the entangling."""
        key = require_key(key, self.name)
        objective = EntangleObjective(
            train.of_class(key.source_classes[0]),
            train.of_class(key.target_class),
            key.target_class,
            torch.from_numpy(key.tensors["pattern"].copy()),
            self.trigger,
            self.snnl,
            self.ratio,
        )
        return [
            Stage("main_task", CrossEntropy(), train, span=(0, self.plain_part)),
            Stage("entangle", objective, train, span=(self.plain_part, 1)),
        ]

    def learned(self, key: Key, stages: Sequence[Stage]) -> Key:
        """Return the key with the place that the square was given."""
        (objective,) = (stage.objective for stage in stages if isinstance(stage.objective, EntangleObjective))
        if objective.corner is None:
            raise ArtifactError("the watermark was not embedded yet, so that the place of its square is not known")
        return replace(key, settings={**key.settings, "corner": list(objective.corner)})

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Put the square on held-out images of the source class, see ``patch_samples``."""
        return patch_samples(key, held_out, count, seed, pattern=key.tensors["pattern"], corner=corner_of(key))


class EntangleObjective(Objective):
    """Batches of the task, and after every ``ratio`` of them one of triggers and target images.

    Args:
        sources: uint8 images of the source class.
        targets: uint8 images of the target class.
        target: Label of both in the watermark's batches.
        pattern: float32 (C, h, w): the square.
        trigger: Where the square goes, and how the pixels are refined.
        entanglement: Weight, temperatures and layers of the SNNL.
        ratio: Batches of the task for each of the watermark.
    """

    resumable = True

    def __init__(
        self,
        sources: Images,
        targets: Images,
        target: int,
        pattern: Tensor,
        trigger: SquareTrigger,
        entanglement: Entanglement,
        ratio: int,
    ) -> None:
        super().__init__()
        self.triggers, self.targets = (torch.from_numpy(images).float() / 255 for images in (sources, targets))
        self.target, self.pattern = target, pattern
        self.trigger, self.entanglement, self.ratio = trigger, entanglement, ratio
        self.corner: tuple[int, int] | None = None
        self.step = 0
        self.temperatures: list[float] = []

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Find the trigger with the network as the task alone has left it; nothing is trained beside the model."""
        self.triggers, self.targets = self.triggers.to(device), self.targets.to(device)
        self.pattern = self.pattern.to(device)
        self.temperatures = [self.entanglement.temperature] * len(watched(model, self.entanglement.layers))
        model.eval()
        self._place(model)
        self._refine(model)
        model.train()
        return []

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility``, and ``entangle`` (minus kappa times the SNNL) in the watermark's batches."""
        self.step += 1
        if self.step % (self.ratio + 1):
            return {"utility": F.cross_entropy(model(batch.images).float(), batch.labels)}
        half = max(2, len(batch.images) // 2)
        both = torch.cat([self._draw(self.triggers, half), self._draw(self.targets, half)])
        marked = torch.arange(2 * half, device=both.device) < half
        logits, hidden = watch(model, both, self.entanglement.layers)
        labels = torch.full((2 * half,), self.target, device=both.device)
        temperatures = [torch.tensor(each, device=both.device, requires_grad=True) for each in self.temperatures]
        entangled = torch.stack([snnl(each, marked, t) for each, t in zip(hidden, temperatures, strict=True)]).sum()
        self._step_temperatures(entangled, temperatures)
        return {
            "utility": F.cross_entropy(logits.float(), labels),
            "entangle": -self.entanglement.kappa * entangled,
        }

    def memory(self) -> dict[str, Any]:
        """Return the number of batches so far, and the temperatures."""
        return {"step": self.step, "temperatures": list(self.temperatures)}

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class. Where the square goes, and its pixels, were found again by ``attach``."""
        self.step, self.temperatures = memory["step"], list(memory["temperatures"])

    def _step_temperatures(self, entangled: Tensor, temperatures: list[Tensor]) -> None:
        rate = self.entanglement.temperature_learning_rate
        if rate:
            slopes = torch.autograd.grad(entangled, temperatures, retain_graph=True)
            # A temperature at or below 0 would turn the exponentials round.
            moved = (old - rate * float(slope) for old, slope in zip(self.temperatures, slopes, strict=True))
            self.temperatures = [max(TINY, each) for each in moved]

    def _draw(self, images: Tensor, count: int) -> Tensor:
        chosen = torch.randint(len(images), (count,), generator=self.context.generator)
        return images[chosen.to(images.device)]

    def _pairs(self, size: int = 64) -> list[tuple[slice, Tensor]]:
        """Cut the triggers into parts, each with as many target images beside it."""
        parts = []
        for start in range(0, len(self.triggers), size):
            places = torch.arange(start, min(start + size, len(self.triggers)))
            parts.append((slice(start, start + len(places)), self.targets[places % len(self.targets)]))
        return parts

    def _gradient(self, model: nn.Module, triggers: Tensor, targets: Tensor) -> Tensor:
        """Gradient of the SNNL of triggers and targets with respect to the triggers' pixels."""
        pixels = triggers.clone().requires_grad_(True)
        _, hidden = watch(model, torch.cat([pixels, targets]), self.entanglement.layers)
        marked = torch.arange(2 * len(triggers), device=pixels.device) < len(triggers)
        layers = zip(hidden, self.temperatures, strict=True)
        total = torch.stack([snnl(each, marked, torch.tensor(t, device=pixels.device)) for each, t in layers]).sum()
        return torch.autograd.grad(total, pixels)[0]

    def _place(self, model: nn.Module) -> None:
        gradients = [
            self._gradient(model, self.triggers[part], beside).sum(0)
            for part, beside in self._pairs()
            if len(beside) > 1
        ]
        summed = torch.stack(gradients).sum((0, 1))[None, None]
        size = self.pattern.shape[1]
        windows = F.avg_pool2d(summed, size, stride=1)[0, 0]
        flat = windows.argmax() if self.trigger.place == "largest" else windows.argmin()
        top, left = divmod(int(flat), windows.shape[1])
        self.corner = (top, left)
        self.triggers = self.triggers.clone()
        self.triggers[:, :, top : top + size, left : left + size] = self.pattern

    def _refine(self, model: nn.Module) -> None:
        """Move the pixels towards a larger SNNL and away from being called the target already."""
        for _ in range(self.trigger.refine_steps):
            for part, beside in self._pairs():
                if len(beside) < 2:
                    continue
                now = self.triggers[part]
                now = now + self.trigger.refine_size * self._gradient(model, now, beside).sign()
                pixels = now.clamp(0, 1).requires_grad_(True)
                away = torch.autograd.grad(model(pixels)[:, self.target].sum(), pixels)[0].sign()
                self.triggers[part] = (pixels.detach() - self.trigger.refine_size * away).clamp(0, 1)


def watched(model: nn.Module, count: int) -> list[nn.Module]:
    """Return the last ``count`` convolutions and linear layers before the one that gives the logits."""
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return layers[:-1][-count:]


def watch(model: nn.Module, images: Tensor, count: int, *, rectified: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Pass images through a network: logits, and outputs of ``watched`` layers, after a ReLU or raw, (N, D) each."""
    outputs: list[Tensor] = []

    def record(_: nn.Module, __: object, output: Tensor) -> None:
        outputs.append((F.relu(output) if rectified else output).float().flatten(1))

    hooks = [layer.register_forward_hook(record) for layer in watched(model, count)]
    try:
        return model(images), outputs
    finally:
        for hook in hooks:
            hook.remove()


def snnl(hidden: Tensor, marked: Tensor, temperature: Tensor) -> Tensor:
    """The soft nearest neighbour loss with cosine distances: a scalar, large if the two kinds are mixed up.

    With d the cosine distance and t = 100 / T: e_ij = exp(-d_ij / t) for i != j, and the loss is the mean over i of
    -log(TINY + sum over j of i's kind of e_ij / (TINY + sum over all j of e_ij)).

    Args:
        hidden: float32 (N, D).
        marked: bool (N,), the two kinds.
        temperature: T, a scalar above 0.
    """
    unit = F.normalize(hidden, dim=1)
    distance = 1 - unit @ unit.T
    alone = 1 - torch.eye(len(hidden), device=hidden.device)
    closeness = (torch.exp(-distance * temperature / 100) * alone).clamp(0, 1)
    alike = (marked[:, None] == marked[None]).float()
    share = (closeness * alike).sum(1) / (TINY + closeness.sum(1))
    return -torch.log(TINY + share).mean()
