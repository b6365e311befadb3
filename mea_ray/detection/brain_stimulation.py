"""Artificial Brain Stimulation (ABS): units that push every image to one class, and the patches that excite them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Images
from mea_ray.detection.base import Detection, Evidence, Trigger
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.training import device as devices

PASS_IMAGES = 512
"""Images in a forward pass of the stimulation."""
AT_ODDS = 2
"""Stimulated images that may disagree with the others about the class that a unit lifts most."""
JUDGED_ON = 500
"""Clean images that a trigger's success is measured on, at most."""


@dataclass(frozen=True)
class Candidate:
    """A unit that lifts one class above all others, whatever the image.

    Attributes:
        layer: Place among the watched layers.
        unit: Channel of a convolution, or output of a linear layer.
        label: The class that it lifts.
        score: How much more it lifts it than any other class, in logits: least over the images that agree.
    """

    layer: int
    unit: int
    label: int
    score: float


class BrainStimulation(Detection):
    """Stimulate units one by one; reverse-engineer a patch for each that lifts one class; see how often it works.

    A unit (a channel of a convolution, an output of a linear layer, the last layer aside) is set to ``levels`` values
    from 0 to nearly ``reach`` times the largest output of its layer, the rest of the network left as it is. It is a
    candidate if it lifts the same class most in all images but two. For the strongest a mask and a pattern are
    optimised, all in one batch: sum over images of -(a + ReLU a) of the unit, ``others`` times the same of all other
    units of its layer, and a price on masks that are too large. REASR is the part of the clean images of other classes
    that the patch turns; a class is flagged if it is above ``bound``.

    As the published code, but for these: REASR is not measured on the few images alone that the patch was made on;
    there is one start for each candidate; patches only, no filters of whole images. Masks begin as a square in the
    middle of the image. Where a small patch of a class is enough for that class, innocent networks are flagged, too.

    Args:
        layers: Last convolutions and linear layers before the last one whose units are stimulated; null takes all.
        images: Clean images that units are stimulated on and patches made on, at least 3.
        levels: Values that a unit is set to, at least 2; the first is 0.
        reach: What the largest output of a layer is multiplied by, above 0.
        per_layer: Candidates of a layer, at most.
        candidates: Candidates in all, at most.
        steps: Updates of masks and patterns.
        learning_rate: Of Adam.
        size: Part of the image that a mask may cover before it is priced, in (0, 1); 64 of 32 x 32 pixels in the paper.
        price: Of a pixel of a mask that is too large; twice that once it is two pixels larger on each side.
        others: Weight of a layer's other units.
        bound: REASR above which a class is flagged, in (0, 1).

    References:
        Liu et al., ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation, CCS 2019, and the
        authors' ``abs.py``; Lv et al., MEA-Defender, 2024, tables V and VIII.

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "abs"
    least_images = AT_ODDS + 1

    def __init__(
        self,
        *,
        layers: int | None = None,
        images: int = 10,
        levels: int = 5,
        reach: float = 8.0,
        per_layer: int = 3,
        candidates: int = 20,
        steps: int = 1000,
        learning_rate: float = 0.1,
        size: float = 0.0625,
        price: float = 500.0,
        others: float = 1e-4,
        bound: float = 0.8,
    ) -> None:
        least = {"layers": (1, layers), "images": (3, images), "levels": (2, levels), "per_layer": (1, per_layer)}
        for name, (low, count) in {**least, "candidates": (1, candidates), "steps": (1, steps)}.items():
            if count is not None and count < low:
                raise ConfigError(f"{name}={count} must be at least {low}")
        for name, value in {"reach": reach, "learning_rate": learning_rate}.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value} must be positive and finite")
        for name, value in {"price": price, "others": others}.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} must be at least 0 and finite; 0 switches it off")
        for name, value in {"size": size, "bound": bound}.items():
            if not 0 < value < 1:
                raise ConfigError(f"{name}={value} must lie strictly between 0 and 1")
        self.layers, self.images, self.levels, self.reach = layers, images, levels, reach
        self.per_layer, self.candidates, self.steps, self.learning_rate = per_layer, candidates, steps, learning_rate
        self.size, self.price, self.others, self.bound = size, price, others, bound

    def inspect(self, model: ImageModel, clean: Images, asked: Images | None, seed: int) -> Evidence:
        """Return the best trigger of each class that a candidate lifts, and their REASR."""
        frozen = copy.deepcopy(model).requires_grad_(False).eval().to(devices.device())
        generator = torch.Generator().manual_seed(derive(seed, "stimulation"))
        order = torch.randperm(len(clean), generator=generator).numpy()
        made_on, judged = clean[order[: self.images]], clean[order[-JUDGED_ON:]]
        found = self.stimulate(frozen, made_on)
        best: dict[int, tuple[Candidate, Trigger]] = {}
        for candidate, trigger in zip(found, self.triggers(frozen, found, made_on, judged, generator), strict=True):
            if candidate.label not in best or trigger.success > best[candidate.label][1].success:
                best[candidate.label] = candidate, trigger
        numbers = {"candidates": float(len(found))}
        for label, (candidate, trigger) in sorted(best.items()):
            numbers |= {f"reasr/{label}": trigger.success, f"lift/{label}": candidate.score}
            numbers |= {f"layer/{label}": float(candidate.layer), f"unit/{label}": float(candidate.unit)}
        flagged = tuple(label for label, (_, trigger) in sorted(best.items()) if trigger.success > self.bound)
        return Evidence(flagged, tuple(trigger for _, (_, trigger) in sorted(best.items())), numbers)

    def stimulate(self, model: ImageModel, images: Images) -> list[Candidate]:
        """Return the units that lift one class on all images but two, the strongest first.

        Args:
            model: In eval mode, on the device of this process.
            images: uint8 (N, C, H, W).
        """
        pixels = torch.from_numpy(images).to(devices.device()).float() / 255
        found: list[Candidate] = []
        for place, layer in enumerate(watched(model, self.layers)):
            with torch.no_grad(), watching([layer]) as seen:
                model(pixels)
                largest = float(seen[0].max().clamp_min(0))
                units = seen[0].shape[1]
            values = torch.arange(self.levels, device=pixels.device) * self.reach * largest / self.levels
            lifts = torch.cat([self._lifts(model, layer, pixels, values, some) for some in _parts(units, self, images)])
            top = lifts.topk(2, dim=2)  # of each unit and image
            labels = top.indices[..., 0]
            usual = labels.mode(dim=1).values
            agree = labels == usual[:, None]
            margin = (top.values[..., 0] - top.values[..., 1]).masked_fill(~agree, float("inf")).amin(1)
            steady = (agree.sum(1) >= max(1, len(images) - AT_ODDS)) & (margin > 0)
            scores = margin.masked_fill(~steady, -1.0)
            for unit in scores.argsort(descending=True, stable=True)[: self.per_layer].tolist():
                if steady[unit]:
                    found.append(Candidate(place, unit, int(usual[unit]), float(scores[unit])))
        return sorted(found, key=lambda candidate: -candidate.score)[: self.candidates]

    def _lifts(self, model: nn.Module, layer: nn.Module, pixels: Tensor, values: Tensor, units: Tensor) -> Tensor:
        """How far each unit lifts each logit above what it is with the unit at 0: float32 (units, N, classes)."""
        count, levels = len(pixels), len(values)
        which = units.repeat_interleave(levels * count)
        level = values.repeat_interleave(count).repeat(len(units))

        def stimulated(_: nn.Module, __: object, output: Tensor) -> Tensor:
            changed = output.clone()
            rows = torch.arange(len(changed), device=changed.device)
            changed[rows, which] = level.view(-1, *[1] * (output.dim() - 2)).expand_as(changed[rows, which])
            return changed

        hook = layer.register_forward_hook(stimulated)
        try:
            with torch.no_grad():
                said = model(pixels.repeat(len(units) * levels, 1, 1, 1))
        finally:
            hook.remove()
        said = said.view(len(units), levels, count, -1)
        return said[:, 1:].amax(1) - said[:, 0]

    def triggers(
        self, model: ImageModel, found: list[Candidate], made_on: Images, judged: Images, generator: torch.Generator
    ) -> list[Trigger]:
        """Reverse-engineer a patch for each candidate, all of them at once.

        Args:
            model: In eval mode, on the device of this process, its parameters frozen.
            found: The candidates.
            made_on: uint8 images that the patches are made on.
            judged: uint8 images that their success is measured on: those that the model does not call the class anyway.
            generator: Of the initial patterns.
        """
        if not found:
            return []
        where, (channels, height, width), kinds = devices.device(), model.shape, len(found)
        pixels = torch.from_numpy(made_on).to(where).float() / 255
        allowed = self.size * height * width
        far = (math.sqrt(allowed) + 2) ** 2
        raw_mask = 4 * middle(height, width).expand(kinds, 1, height, width) - 2
        raw_pattern = torch.randn((kinds, channels, height, width), generator=generator)
        raw_mask, raw_pattern = (raw.to(where).requires_grad_(True) for raw in (raw_mask, raw_pattern))
        optimiser = torch.optim.Adam([raw_mask, raw_pattern], self.learning_rate)
        layers = watched(model, self.layers)
        used = sorted({candidate.layer for candidate in found})
        for _ in range(self.steps):
            mask, pattern = _bounded(raw_mask), _bounded(raw_pattern)
            mixed = (1 - mask)[:, None] * pixels[None] + (mask * pattern)[:, None]
            with watching([layers[place] for place in used]) as seen:
                model(mixed.flatten(0, 1))
            outputs = dict(zip(used, seen, strict=True))
            sizes = mask.sum((1, 2, 3))
            loss = (self.price * sizes * ((sizes > allowed).float() + (sizes > far).float())).sum()
            for place, candidate in enumerate(found):
                mine = outputs[candidate.layer].view(kinds, len(pixels), *outputs[candidate.layer].shape[1:])[place]
                excited = mine + mine.relu()
                of_unit = excited[:, candidate.unit].sum()
                loss = loss - of_unit + self.others * (excited.sum() - of_unit)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        masks, patterns = (_bounded(raw).detach().cpu().numpy() for raw in (raw_mask, raw_pattern))
        before = metrics.predictions(model, judged)
        made = []
        for candidate, mask, pattern in zip(found, masks, patterns, strict=True):
            trigger = Trigger(candidate.label, mask, pattern, 0.0)
            rest = judged[before != candidate.label]
            turned = metrics.predictions(model, trigger.on(rest)) == candidate.label if len(rest) else np.zeros(1)
            made.append(Trigger(candidate.label, mask, pattern, float(turned.mean())))
        return made


def watched(model: ImageModel, count: int | None) -> list[nn.Module]:
    """Return the convolutions and linear layers before the one that gives the logits, or the last ``count`` of them."""
    last = set(model.head.modules())
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in last]
    return layers if count is None else layers[-count:]


@contextmanager
def watching(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Give the list that the layers' outputs are put into, in the order of the layers, once a pass is over."""
    seen: dict[int, Tensor] = {}
    in_order: list[Tensor] = []

    def keep(place: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            seen[place] = output
            if len(seen) == len(layers):
                in_order[:] = [seen[each] for each in range(len(layers))]

        return hook

    hooks = [layer.register_forward_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        yield in_order
    finally:
        for hook in hooks:
            hook.remove()


def middle(height: int, width: int) -> Tensor:
    """A square of half the image's sides in its middle, 1 within and 0 outside: float32 (H, W)."""
    square = torch.zeros(height, width)
    square[height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return square


def _parts(units: int, settings: BrainStimulation, images: Images) -> list[Tensor]:
    at_once = max(1, PASS_IMAGES // (settings.levels * len(images)))
    return list(torch.arange(units, device=devices.device()).split(at_once))


def _bounded(raw: Tensor) -> Tensor:
    return (torch.tanh(raw) + 1) / 2
