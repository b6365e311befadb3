"""Several independent keys in one model: each is drawn by itself, and their ranks combine exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mea_ray.config.components import WatermarkChoice
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext
from mea_ray.watermarks.base import Key, Stage, Watermark, WatermarkSamples, require_key
from mea_ray.watermarks.mixed_classes import MixedClasses


class SeveralKeys(Watermark):
    """A scheme of mixed classes, embedded with several keys at once.

    Choose it for small p-values with few classes: two keys of ten classes allow 1 in 129,600.

    The keys are drawn independently of each other, so that their ranks on an innocent suspect are independent and the
    distribution of the ranks' product can be counted. They may share classes. Every batch has one forward pass for
    each key, so training time grows with the number of keys.

    Args:
        of: The scheme; its ``key.classes`` must not be ``chosen``, as only drawn keys have ranks that combine.
        keys: Number of keys.

    Raises:
        ConfigError: The scheme mixes no classes, or its classes are chosen by hand.
    """

    name = "several_keys"

    def __init__(
        self,
        *,
        of: WatermarkChoice = WatermarkChoice(name="composite", key={"classes": "seed"}),
        keys: Annotated[int, Field(ge=2, le=8)] = 2,
    ) -> None:
        scheme = of.build()
        if not isinstance(scheme, MixedClasses):
            raise ConfigError(f"of={of.name} mixes no two classes; choose composite, mea_carrier or mea_defender")
        if scheme.key_draw.classes == "chosen":
            raise ConfigError(
                f"of.key.classes=chosen gives all {keys} keys the same classes; set of.key.classes to system, beacon "
                "or seed"
            )
        self.key_draw, self.statistic = scheme.key_draw, scheme.statistic
        self.schemes: list[MixedClasses] = [
            of.build(key=scheme.key_draw.changed(number=number).resolved()) for number in range(keys)
        ]
        self.source_classes, self.target_class = scheme.source_classes, scheme.target_class

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw every key; the classes of the whole are those of the first."""
        parts = [scheme.make_key(train, seed) for scheme in self.schemes]
        first = parts[0]
        draw = {**first.draw, "keys": len(parts)}
        whole = Key(self.name, first.source_classes, first.target_class, first.seed, draw=draw)
        return self.with_parts(whole, parts)

    @staticmethod
    def with_parts(key: Key, parts: Sequence[Key]) -> Key:
        """Return a key of this scheme that is made of these; the inverse of ``parts``."""
        tensors = {f"{place}/{name}": value for place, part in enumerate(parts) for name, value in part.tensors.items()}
        bodies = [{k: v for k, v in asdict(part).items() if k not in {"tensors", "seed_from"}} for part in parts]
        return replace(key, settings={"keys": bodies}, tensors=tensors)

    @staticmethod
    def parts(key: Key) -> list[Key]:
        """Return the keys that a key of this scheme is made of."""
        keys = []
        for place, body in enumerate(key.settings["keys"]):
            own = f"{place}/"
            tensors = {name.removeprefix(own): v for name, v in key.tensors.items() if name.startswith(own)}
            keys.append(Key(**{**body, "source_classes": tuple(body["source_classes"])}, tensors=tensors))
        return keys

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the scheme's stages; in each the losses of all keys are summed."""
        parts = self.parts(require_key(key, self.name))
        stages = [scheme.stages(part, train) for scheme, part in zip(self.schemes, parts, strict=True)]
        return [
            Stage(first.name, SumOfObjectives([each.objective for each in together]), *_rest(first))
            for together in zip(*stages, strict=True)
            for first in together[:1]
        ]

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Return samples of the first key; verification takes each of ``parts`` by itself."""
        return self.schemes[0].samples(self.parts(key)[0], held_out, count, seed)


def _rest(stage: Stage) -> tuple[ImageSet, Mapping[str, Any], tuple[float, float]]:
    return stage.train, stage.overrides, stage.span


class SumOfObjectives(Objective):
    """Several objectives for one model, whose gradients are summed.

    Args:
        objectives: Each with its own pass over the batch; at least one.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.objectives = list(objectives)
        self.least_batch = max(each.least_batch for each in objectives)
        self.resumable = all(each.resumable for each in objectives)

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Attach every objective."""
        return [parameter for each in self.objectives for parameter in each.attach(model, device)]

    def start(self, context: StepContext) -> None:
        """Start every objective."""
        super().start(context)
        for each in self.objectives:
            each.start(context)

    def start_epoch(self, epoch: int) -> None:
        """Start an epoch of every objective."""
        for each in self.objectives:
            each.start_epoch(epoch)

    def memory(self) -> dict[str, Any]:
        """Return what every objective remembers."""
        return {"each": [each.memory() for each in self.objectives]}

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class."""
        for each, own in zip(self.objectives, memory["each"], strict=True):
            each.recall(own)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of every objective, with its place behind their names: ``ver.0``."""
        return {
            f"{name}.{place}": term
            for place, each in enumerate(self.objectives)
            for name, term in each.terms(model, batch).items()
        }

    def backward(self, terms: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Add the gradients of every objective, each weighted as it weights its own."""
        losses = []
        for place, each in enumerate(self.objectives):
            own = {name.rpartition(".")[0]: t for name, t in terms.items() if name.endswith(f".{place}")}
            losses.append(each.backward(own, model))
        return torch.stack(losses).sum()

    def updated(self, model: nn.Module) -> None:
        """Pass the update on to every objective."""
        for each in self.objectives:
            each.updated(model)
