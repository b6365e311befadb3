"""The Entangled Watermark (EWE): trigger and target share a representation, so that neither is copied alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, CrossEntropy, Objective
from mea_ray.watermarks.base import Key, Stage, Watermark, WatermarkSamples
from mea_ray.watermarks.mea_defender.scheme import require_key
from mea_ray.watermarks.patches import check_label, check_patch, patch_samples

TINY = 1e-5
"""What the published code adds below the fraction and inside of the logarithm."""


class EntangledWatermark(Watermark):
    """Cross-entropy minus kappa times the soft nearest neighbour loss (SNNL) of trigger and target, in alternation.

    First the task alone. Then the trigger is found: images of the source class get a white square where the SNNL's
    gradient says (see ``place``), and their pixels are refined by signed steps. Then every ``ratio`` batches of the
    task are followed by one of half triggers and half target images, all labelled as the target, whose loss is
    CE - kappa * sum over layers of SNNL(trigger or target, temperature): a large SNNL means that the two cannot be told
    apart. The temperatures are learnt by descent on the same loss, and the weights get the gradient of both terms.

    Verified on held-out images of the source class with the same square; the published code verifies with the triggers
    that it trained on, and takes images of another dataset in their place for CIFAR-10 (``out``), which is not here.

    Args:
        source_class: Class whose images carry the square.
        target_class: Label that they get.
        size: Side of the square, in pixels; 3 in the published code.
        place: The square goes where the gradient's sum is ``least`` (the published code) or ``largest``.
        kappa: Weight of the SNNL beside the mean cross-entropy, at least 0.
        temperature: Initial temperature T; distances are divided by 100 / T.
        temperature_learning_rate: Of the temperatures; 0 leaves them.
        layers: Last convolutions and linear layers before the logits whose outputs count.
        ratio: Batches of the task for each of the watermark.
        refine_steps: Signed steps on the triggers' pixels towards a larger SNNL, and as many away from the target.
        refine_size: Size of a step, in units of [0, 1].
        plain_part: Part of the epochs that go to the task alone, in (0, 1).

    References:
        Jia et al., Entangled Watermarks as a Defense against Model Extraction, USENIX Security 2021,
        https://arxiv.org/abs/2002.12200, equations 1 to 3; Frosst et al., SNNL, 2019, https://arxiv.org/abs/1902.01889.

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "ewe"

    def __init__(
        self,
        *,
        source_class: int = 1,
        target_class: int = 0,
        size: int = 3,
        place: str = "least",
        kappa: float = 64.0,
        temperature: float = 1.0,
        temperature_learning_rate: float = 0.1,
        layers: int = 3,
        ratio: int = 4,
        refine_steps: int = 10,
        refine_size: float = 0.01,
        plain_part: float = 0.7,
    ) -> None:
        if source_class == target_class:
            raise ConfigError(f"source_class={source_class} must differ from target_class")
        if place not in {"least", "largest"}:
            raise ConfigError(f"place={place!r} must be least or largest")
        for name, count in {"size": size, "layers": layers, "ratio": ratio}.items():
            if count < 1:
                raise ConfigError(f"{name}={count} must be at least 1")
        rates = {"kappa": kappa, "temperature_learning_rate": temperature_learning_rate, "refine_size": refine_size}
        for name, value in {**rates, "refine_steps": refine_steps}.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} must be at least 0 and finite; 0 switches it off")
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"temperature={temperature} must be positive and finite")
        if not 0 < plain_part < 1:
            raise ConfigError(f"plain_part={plain_part} must lie strictly between 0 and 1")
        self.source_class, self.target_class, self.size, self.plain_part = source_class, target_class, size, plain_part
        self.entangling = Entangling(
            largest=place == "largest",
            kappa=kappa,
            temperature=temperature,
            temperature_learning_rate=temperature_learning_rate,
            layers=layers,
            ratio=ratio,
            refine_steps=refine_steps,
            refine_size=refine_size,
        )

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Check the classes; where the square goes is found by the victim's training (``learned``)."""
        check_patch(self.size, (0, 0), train.shape)
        check_label("source_class", self.source_class, train)
        check_label("target_class", self.target_class, train)
        settings = {"shape": list(train.shape), "corner": [0, 0]}
        # The published code sets the first channel only; in a colour image that is red where it was bright already.
        tensors = {"pattern": np.ones((train.shape[0], self.size, self.size), np.float32)}
        return Key(self.name, (self.source_class, -1), self.target_class, derive(seed, "key"), settings, tensors)

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return two stages: the task alone, then the entangling."""
        key = require_key(key, self.name)
        objective = EntangleObjective(
            train.of_class(key.source_classes[0]),
            train.of_class(key.target_class),
            key.target_class,
            torch.from_numpy(key.tensors["pattern"].copy()),
            self.entangling,
        )
        return [
            Stage("main_task", CrossEntropy(), train, span=(0, self.plain_part)),
            Stage("entangle", objective, train, span=(self.plain_part, 1)),
        ]

    def learned(self, key: Key, stages: Sequence[Stage]) -> Key:
        """Return the key with the place that the square was given."""
        (objective,) = (stage.objective for stage in stages if isinstance(stage.objective, EntangleObjective))
        if objective.corner is None:
            raise ArtifactError("the watermark was not embedded yet, so that its place is not known")
        return replace(key, settings={**key.settings, "corner": list(objective.corner)})

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Put the square on held-out images of the source class, see ``patch_samples``."""
        corner = tuple(key.settings["corner"])
        return patch_samples(key, held_out, count, seed, pattern=key.tensors["pattern"], corner=corner)


@dataclass(frozen=True)
class Entangling:
    """Settings of ``EntangleObjective``; ``EntangledWatermark`` documents them."""

    largest: bool = False
    kappa: float = 64.0
    temperature: float = 1.0
    temperature_learning_rate: float = 0.1
    layers: int = 3
    ratio: int = 4
    refine_steps: int = 10
    refine_size: float = 0.01


class EntangleObjective(Objective):
    """Batches of the task, and after every ``ratio`` of them one of triggers and target images.

    Args:
        sources: uint8 images of the source class.
        targets: uint8 images of the target class.
        target: Label of both in the watermark's batches.
        pattern: float32 (C, h, w): the square.
        settings: See ``EntangledWatermark``.
    """

    def __init__(
        self,
        sources: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        targets: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        target: int,
        pattern: Tensor,
        settings: Entangling,
    ) -> None:
        super().__init__()
        self.triggers, self.targets = (torch.from_numpy(images).float() / 255 for images in (sources, targets))
        self.target, self.pattern, self.settings = target, pattern, settings
        self.corner: tuple[int, int] | None = None
        self.step = 0
        self.temperatures: list[float] = []

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Find the trigger with the network as the task alone has left it; nothing is trained beside the model."""
        self.triggers, self.targets = self.triggers.to(device), self.targets.to(device)
        self.pattern = self.pattern.to(device)
        self.temperatures = [self.settings.temperature] * len(watched(model, self.settings.layers))
        model.eval()
        self._place(model)
        self._refine(model)
        model.train()
        return []

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility``, and ``entangle`` (minus kappa times the SNNL) in the watermark's batches."""
        self.step += 1
        if self.step % (self.settings.ratio + 1):
            return {"utility": F.cross_entropy(model(batch.images).float(), batch.labels)}
        half = max(2, len(batch.images) // 2)
        both = torch.cat([self._draw(self.triggers, half), self._draw(self.targets, half)])
        marked = torch.arange(2 * half, device=both.device) < half
        said, hidden = watch(model, both, self.settings.layers)
        labels = torch.full((2 * half,), self.target, device=both.device)
        heat = [torch.tensor(each, device=both.device, requires_grad=True) for each in self.temperatures]
        entangled = sum(snnl(each, marked, t) for each, t in zip(hidden, heat, strict=True))
        assert isinstance(entangled, Tensor)
        terms = {"utility": F.cross_entropy(said.float(), labels), "entangle": -self.settings.kappa * entangled}
        rate = self.settings.temperature_learning_rate
        if rate and self.settings.kappa:
            moves = torch.autograd.grad(terms["entangle"], heat, retain_graph=True)
            # A temperature at or below 0 would turn the exponentials round.
            self.temperatures = [
                max(TINY, old - rate * float(move)) for old, move in zip(self.temperatures, moves, strict=True)
            ]
        return terms

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
        """Gradient of the SNNL of triggers and targets by the triggers' pixels."""
        pixels = triggers.clone().requires_grad_(True)
        _, hidden = watch(model, torch.cat([pixels, targets]), self.settings.layers)
        marked = torch.arange(2 * len(triggers), device=pixels.device) < len(triggers)
        total = sum(
            snnl(each, marked, torch.tensor(t, device=pixels.device))
            for each, t in zip(hidden, self.temperatures, strict=True)
        )
        assert isinstance(total, Tensor)
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
        flat = windows.argmax() if self.settings.largest else windows.argmin()
        top, left = divmod(int(flat), windows.shape[1])
        self.corner = (top, left)
        self.triggers = self.triggers.clone()
        self.triggers[:, :, top : top + size, left : left + size] = self.pattern

    def _refine(self, model: nn.Module) -> None:
        """Move the pixels towards a larger SNNL and away from being called the target already."""
        for _ in range(self.settings.refine_steps):
            for part, beside in self._pairs():
                if len(beside) < 2:
                    continue
                now = self.triggers[part]
                now = now + self.settings.refine_size * self._gradient(model, now, beside).sign()
                pixels = now.clamp(0, 1).requires_grad_(True)
                away = torch.autograd.grad(model(pixels)[:, self.target].sum(), pixels)[0].sign()
                self.triggers[part] = (pixels.detach() - self.settings.refine_size * away).clamp(0, 1)


def watched(model: nn.Module, count: int) -> list[nn.Module]:
    """Return the last ``count`` convolutions and linear layers before the one that gives the logits."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return layers[:-1][-count:]


def watch(model: nn.Module, images: Tensor, count: int, *, rectified: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Pass images through a network: logits, and outputs of ``watched`` layers, after a ReLU or raw, (N, D) each."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        seen.append((F.relu(output) if rectified else output).float().flatten(1))

    hooks = [layer.register_forward_hook(keep) for layer in watched(model, count)]
    try:
        return model(images), seen
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
