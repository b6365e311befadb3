"""Artificial Brain Stimulation (ABS): units that push every image to one class, and the patches that excite them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.seeding import derive
from mea_ray.core.types import Images
from mea_ray.detection.base import Count, Detection, DetectionReport, Positive
from mea_ray.evaluation import metrics
from mea_ray.evaluation.triggers import Trigger
from mea_ray.models.base import ImageModel
from mea_ray.training import device as devices

PASS_IMAGES = 512
"""Images in a forward pass of the stimulation."""
DISAGREEING = 2
"""Stimulated images that may disagree with the others about the class that a unit raises most."""
TEST_IMAGES = 500
"""Most clean images that a trigger's success is measured on."""


@dataclass(frozen=True)
class Candidate:
    """A unit that raises one class above all others, whatever the image.

    Attributes:
        layer: Position among the inspected layers.
        unit: Channel of a convolution, or output of a linear layer.
        label: The class that it raises.
        score: How much more it raises this class than any other, in logits: the minimum over the images that agree.
    """

    layer: int
    unit: int
    label: int
    score: float


class BrainStimulation(Detection):
    """Stimulate units one by one, reverse-engineer a patch for each that raises one class, and test the patches.

    Choose it to look for backdoors in single neurons.

    A unit is a channel of a convolution or an output of a linear layer before the last one. It is set to ``levels``
    values from 0 to nearly ``reach`` times the largest output of its layer. It is a candidate if it raises the same
    class most in all images but two. For the strongest candidates a mask and a pattern are optimised, all in one batch.
    The loss is the sum over images of -(a + ReLU a) of the unit's output a, ``others`` times the opposite for the other
    units of its layer, and a penalty on masks that are too large. REASR is the fraction of clean images of other
    classes that the patch turns. A class is flagged if its REASR is above ``bound``.

    It differs from the published code in four points: REASR is not only measured on the few images that the patch was
    optimised on; there is one start for each candidate; there are patches only, no filters of whole images; masks start
    as a square in the middle of the image. Where a small patch of a class is enough to predict it, innocent networks
    are flagged, too.

    Args:
        layers: Number of last layers before the output layer whose units are stimulated; null takes all.
        images: Clean images for stimulation and optimisation.
        levels: Number of values that a unit is set to; the first is 0.
        reach: Factor on the largest output of a layer.
        per_layer: Most candidates of a layer.
        candidates: Most candidates in all.
        steps: Updates of masks and patterns.
        learning_rate: Learning rate of Adam.
        size: Fraction of the image that a mask may cover without penalty; 64 of 32 x 32 pixels in the paper.
        price: Penalty on a pixel of a mask that is too large; doubled once it is two pixels larger on each side.
        others: Weight of a layer's other units.
        bound: REASR above which a class is flagged.

    References:
        Liu et al., ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation, CCS 2019, and the
        authors' ``abs.py``; Lv et al., MEA-Defender, 2024, tables V and VIII.
    """

    name = "abs"
    needs_features = True
    least_images = DISAGREEING + 1

    def __init__(
        self,
        *,
        layers: Count | None = None,
        images: Annotated[int, Field(ge=DISAGREEING + 1)] = 10,
        levels: Annotated[int, Field(ge=2)] = 5,
        reach: Positive = 8.0,
        per_layer: Count = 3,
        candidates: Count = 20,
        steps: Count = 1000,
        learning_rate: Positive = 0.1,
        size: Annotated[float, Field(gt=0, lt=1)] = 0.0625,
        price: Annotated[float, Field(ge=0)] = 500.0,
        others: Annotated[float, Field(ge=0)] = 1e-4,
        bound: Annotated[float, Field(gt=0, lt=1)] = 0.8,
    ) -> None:
        self.layers, self.images, self.levels, self.reach = layers, images, levels, reach
        self.per_layer, self.candidates, self.steps, self.learning_rate = per_layer, candidates, steps, learning_rate
        self.size, self.price, self.others, self.bound = size, price, others, bound

    def inspect(self, model: ImageModel, clean: Images, samples: Images | None, seed: int) -> DetectionReport:
        """Return the best trigger of each class that a candidate raises, and their REASR."""
        frozen = copy.deepcopy(model).requires_grad_(False).eval().to(devices.device())
        generator = torch.Generator().manual_seed(derive(seed, "stimulation"))
        order = torch.randperm(len(clean), generator=generator).numpy()
        optimised_on, tested_on = clean[order[: self.images]], clean[order[-TEST_IMAGES:]]
        candidates = self.stimulate(frozen, optimised_on)
        best: dict[int, tuple[Candidate, Trigger]] = {}
        for candidate, trigger in zip(
            candidates, self.triggers(frozen, candidates, optimised_on, tested_on, generator), strict=True
        ):
            if candidate.label not in best or trigger.success > best[candidate.label][1].success:
                best[candidate.label] = candidate, trigger
        numbers = {"candidates": float(len(candidates))}
        for label, (candidate, trigger) in sorted(best.items()):
            numbers |= {f"reasr/{label}": trigger.success, f"lift/{label}": candidate.score}
            numbers |= {f"layer/{label}": float(candidate.layer), f"unit/{label}": float(candidate.unit)}
        flagged = tuple(label for label, (_, trigger) in sorted(best.items()) if trigger.success > self.bound)
        return DetectionReport(flagged, tuple(trigger for _, (_, trigger) in sorted(best.items())), numbers)

    def stimulate(self, model: ImageModel, images: Images) -> list[Candidate]:
        """Return the units that raise one class most on all images but two, the strongest first.

        Args:
            model: In eval mode, on the device of this process.
            images: uint8 (N, C, H, W).
        """
        pixels = torch.from_numpy(images).to(devices.device()).float() / 255
        candidates: list[Candidate] = []
        for place, layer in enumerate(inspected_layers(model, self.layers)):
            with torch.no_grad(), recorded_outputs([layer]) as seen:
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
            steady = (agree.sum(1) >= max(1, len(images) - DISAGREEING)) & (margin > 0)
            scores = margin.masked_fill(~steady, -1.0)
            for unit in scores.argsort(descending=True, stable=True)[: self.per_layer].tolist():
                if steady[unit]:
                    candidates.append(Candidate(place, unit, int(usual[unit]), float(scores[unit])))
        return sorted(candidates, key=lambda candidate: -candidate.score)[: self.candidates]

    def _lifts(self, model: nn.Module, layer: nn.Module, pixels: Tensor, values: Tensor, units: Tensor) -> Tensor:
        """Return how far each unit raises each logit above that with the unit at 0: float32 (units, N, classes)."""
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
                logits: Tensor = model(pixels.repeat(len(units) * levels, 1, 1, 1))
        finally:
            hook.remove()
        logits = logits.view(len(units), levels, count, -1)
        return logits[:, 1:].amax(1) - logits[:, 0]

    def triggers(
        self,
        model: ImageModel,
        candidates: list[Candidate],
        optimised_on: Images,
        tested_on: Images,
        generator: torch.Generator,
    ) -> list[Trigger]:
        """Reverse-engineer a patch for each candidate, all of them at once.

        Args:
            model: In eval mode, on the device of this process, its parameters frozen.
            candidates: The candidates.
            optimised_on: uint8 images that the patches are optimised on.
            tested_on: uint8 images that their success is measured on, except those that the model assigns to the class
                without a patch.
            generator: Random stream of the initial patterns.
        """
        if not candidates:
            return []
        where, (channels, height, width), kinds = devices.device(), model.shape, len(candidates)
        pixels = torch.from_numpy(optimised_on).to(where).float() / 255
        allowed = self.size * height * width
        far = (math.sqrt(allowed) + 2) ** 2
        raw_mask = 4 * middle(height, width).expand(kinds, 1, height, width) - 2
        raw_pattern = torch.randn((kinds, channels, height, width), generator=generator)
        raw_mask, raw_pattern = (raw.to(where).requires_grad_(True) for raw in (raw_mask, raw_pattern))
        optimiser = torch.optim.Adam([raw_mask, raw_pattern], self.learning_rate)
        layers = inspected_layers(model, self.layers)
        used = sorted({candidate.layer for candidate in candidates})
        for _ in range(self.steps):
            mask, pattern = _bounded(raw_mask), _bounded(raw_pattern)
            mixed = (1 - mask)[:, None] * pixels[None] + (mask * pattern)[:, None]
            with recorded_outputs([layers[place] for place in used]) as seen:
                model(mixed.flatten(0, 1))
            outputs = dict(zip(used, seen, strict=True))
            sizes = mask.sum((1, 2, 3))
            loss = (self.price * sizes * ((sizes > allowed).float() + (sizes > far).float())).sum()
            for place, candidate in enumerate(candidates):
                mine = outputs[candidate.layer].view(kinds, len(pixels), *outputs[candidate.layer].shape[1:])[place]
                excited = mine + mine.relu()
                of_unit = excited[:, candidate.unit].sum()
                loss = loss - of_unit + self.others * (excited.sum() - of_unit)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        masks, patterns = (_bounded(raw).detach().cpu().numpy() for raw in (raw_mask, raw_pattern))
        before = metrics.predictions(model, tested_on)
        made = []
        for candidate, mask, pattern in zip(candidates, masks, patterns, strict=True):
            trigger = Trigger(candidate.label, mask, pattern, 0.0)
            rest = tested_on[before != candidate.label]
            turned = metrics.predictions(model, trigger.on(rest)) == candidate.label if len(rest) else np.zeros(1)
            made.append(Trigger(candidate.label, mask, pattern, float(turned.mean())))
        return made


def inspected_layers(model: ImageModel, count: int | None) -> list[nn.Module]:
    """Return the convolutions and linear layers before the one that gives the logits, or the last ``count`` of them."""
    last = set(model.head.modules())
    layers: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in last
    ]
    return layers if count is None else layers[-count:]


@contextmanager
def recorded_outputs(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the layers' outputs in each forward pass, in the order of the layers, in the list that is returned."""
    seen: dict[int, Tensor] = {}
    in_order: list[Tensor] = []

    def record(place: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            seen[place] = output
            if len(seen) == len(layers):
                in_order[:] = [seen[each] for each in range(len(layers))]

        return hook

    hooks = [layer.register_forward_hook(record(place)) for place, layer in enumerate(layers)]
    try:
        yield in_order
    finally:
        for hook in hooks:
            hook.remove()


def middle(height: int, width: int) -> Tensor:
    """Return a square of half the image's sides in its middle, 1 inside and 0 outside: float32 (H, W)."""
    square = torch.zeros(height, width)
    square[height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return square


def _parts(units: int, settings: BrainStimulation, images: Images) -> list[Tensor]:
    at_once = max(1, PASS_IMAGES // (settings.levels * len(images)))
    return list(torch.split(torch.arange(units, device=devices.device()), at_once))


def _bounded(raw: Tensor) -> Tensor:
    return (torch.tanh(raw) + 1) / 2
