"""How much faster are many small networks trained as one stack than one after the other? Both, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from mea_ray.config.training import Precision, TrainingConfig
from mea_ray.core import seeding
from mea_ray.core.errors import ConfigError
from mea_ray.models.build import build_model
from mea_ray.training import device as devices
from mea_ray.training.objective import CrossEntropy
from mea_ray.training.precision import autocast_dtype
from mea_ray.training.stack import Training, train_stack


@dataclass(frozen=True)
class StackBench:
    """Speeds in images per second, summed over the networks; each is the median over the rounds.

    Attributes:
        single: For each number of networks, one trained after the other.
        stacked: For each number of networks, all trained as one stack.
        ratio: For each number of networks, the median over the rounds of stacked / single.
        difference: For each number of networks, the largest difference between a weight of a stacked and of a single
            training, as a part of the largest weight.
        rounds: The speeds of each round: networks, single, stacked.
        settings: What was measured: model, shape, batch size, seeds, device, threads, precision.
    """

    single: dict[int, float]
    stacked: dict[int, float]
    ratio: dict[int, float]
    difference: dict[int, float]
    rounds: list[dict[str, float]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the figures of n networks under ``..._n``."""
        figures = {
            f"{name}_{count}": values[count]
            for count in self.ratio
            for name, values in (
                ("single", self.single),
                ("stacked", self.stacked),
                ("ratio", self.ratio),
                ("difference", self.difference),
            )
        }
        return {**figures, "rounds": self.rounds, "settings": self.settings}


def bench_stack(
    *,
    networks: tuple[int, ...] = (8, 32),
    shape: tuple[int, int, int] = (1, 8, 8),
    classes: int = 10,
    model: str = "vgg_like",
    model_params: Mapping[str, Any] | None = None,
    seeds: Literal["one", "own"] = "one",
    steps: int = 10,
    rounds: int = 3,
    batch_size: int = 64,
    precision: Precision = "auto",
    seed: int = 0,
    on_round: Callable[[dict[str, float]], None] | None = None,
) -> StackBench:
    """Train the same networks as one stack and one after the other, in turns, on the same random images.

    Args:
        networks: Numbers of networks to measure with.
        shape: (channels, height, width) of the images.
        classes: Classes of the images.
        model: Name in the table of models.
        model_params: Parameters of the model; None is a width of 0.25 for a model that has one.
        seeds: ``one``: all trainings have one seed and see the same batches, as thefts of null models do. ``own``: each
            has batches, augmentation and dropout of its own.
        steps: Steps of each training.
        rounds: Counted rounds; one before them warms the machine up.
        batch_size: Images per step.
        precision: As ``training.precision``.
        seed: Seed of images, weights and batches.
        on_round: Called with the speeds of each counted round.

    Raises:
        ConfigError: A count is below its least value, or a name or a parameter is unknown.
    """
    for name, count, least in (
        ("networks", min(networks, default=0), 2),
        ("steps", steps, 1),
        ("rounds", rounds, 1),
        ("batch_size", batch_size, 2),
    ):
        if count < least:
            raise ConfigError(f"{name}={count} must be at least {least}")
    rng = seeding.numpy_generator(seed, "bench", "images")
    images = rng.integers(0, 256, size=(steps * batch_size, *shape), dtype=np.uint8)
    labels = rng.integers(classes, size=len(images))
    training = TrainingConfig(
        epochs=1, batch_size=batch_size, precision=precision, augment=("flip",), stack=max(networks)
    )

    def due(count: int) -> list[Training]:
        trainings = []
        for row in range(count):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeding.derive(seed, "weights", row))
                network = build_model(model, shape, classes, {"width": 0.25} if model_params is None else model_params)
            own = seeding.derive(seed, row) if seeds == "own" else seed
            trainings.append(Training(network, images, labels, CrossEntropy(), training, own))
        return trainings

    measured: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        for count in networks:
            speeds = _round(due(count), due(count), stack_first=turn % 2 == 0)
            if turn:
                measured.append({"networks": count, **speeds})
                if on_round is not None:
                    on_round(measured[-1])
    where = devices.device()

    def median(count: int, value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(each) for each in measured if each["networks"] == count)

    return StackBench(
        single={count: median(count, lambda each: each["single"]) for count in networks},
        stacked={count: median(count, lambda each: each["stacked"]) for count in networks},
        ratio={count: median(count, lambda each: each["stacked"] / each["single"]) for count in networks},
        difference={count: max(x["difference"] for x in measured if x["networks"] == count) for count in networks},
        rounds=measured,
        settings={
            "shape": list(shape),
            "model": model,
            "seeds": seeds,
            "batch_size": batch_size,
            "steps": steps,
            "device": where.type,
            "threads": torch.get_num_threads(),
            "autocast": str(autocast_dtype(precision, where)),
        },
    )


def _round(stack: list[Training], alone: list[Training], *, stack_first: bool) -> dict[str, float]:
    contestants: dict[str, Callable[[], object]] = {
        "stacked": lambda: train_stack(stack),
        "single": lambda: [each.run() for each in alone],
    }
    images = sum(len(each.images) for each in stack)
    speeds: dict[str, float] = {}
    # A training ends with its weights on the CPU, so that nothing is left for a GPU to do when the clock is read.
    for name in contestants if stack_first else reversed(contestants):
        started = time.perf_counter()
        contestants[name]()
        speeds[name] = images / (time.perf_counter() - started)
    pairs = [
        (ours.detach(), theirs.detach())
        for one, other in zip(stack, alone, strict=True)
        for ours, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True)
    ]
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    speeds["difference"] = max(float((ours - theirs).abs().max()) for ours, theirs in pairs) / largest
    return speeds
