"""Is self-supervised training bound by its views? Views of a batch beside the step they are for, and one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mea_ray.core import seeding
from mea_ray.core.errors import ConfigError
from mea_ray.models.build import build_model
from mea_ray.training import device as devices
from mea_ray.training.augment import to_float
from mea_ray.training.views import Views

GOAL = 0.1
"""Views should take at most this part of the step's time."""


@dataclass(frozen=True)
class ViewsBench:
    """Speeds in views per second; each is the median over the rounds.

    Attributes:
        batched: ``Views`` of whole batches, on the device.
        step: Forward and backward pass of the encoder over views that are ready.
        per_image: torchvision's transforms of the same kinds, image by image on the CPU in this process.
        share: Median over the rounds of the part of views and pass together that the views take, in [0, 1].
        speedup: Median over the rounds of batched / per_image.
        goal: What ``share`` should stay below.
        rounds: The speeds of each round.
        settings: What was measured: model, shape, batch size, device, threads.
    """

    batched: float
    step: float
    per_image: float
    share: float
    speedup: float
    goal: float
    rounds: list[dict[str, float]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def bench_views(
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    model: str = "resnet18",
    model_params: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    batches: int = 3,
    rounds: int = 5,
    seed: int = 0,
    on_round: Callable[[dict[str, float]], None] | None = None,
) -> ViewsBench:
    """Measure the views of a batch, the pass that they are made for, and views made one by one, in every round.

    Args:
        shape: (channels, height, width); 3 channels, for torchvision's colour jitter knows no others.
        model: Name in the table of models.
        model_params: Parameters of the model.
        batch_size: Views at a time.
        batches: Batches of each measurement.
        rounds: Counted rounds; one before them warms the machine up.
        seed: Seed of images, weights and draws.
        on_round: Called with the speeds of each counted round.

    Raises:
        ConfigError: A name, a parameter, or a count below 1.
    """
    for name, count in {"batch_size": batch_size, "batches": batches, "rounds": rounds}.items():
        if count < 1:
            raise ConfigError(f"{name}={count} must be at least 1")
    if shape[0] != 3:
        raise ConfigError(f"shape={list(shape)} must have 3 channels: colours are what most of a view's work is")
    where = devices.device()
    network = build_model(model, shape, 10, model_params).to(where).train()
    rng = seeding.numpy_generator(seed, "bench", "views")
    pixels = torch.from_numpy(rng.integers(0, 256, size=(batch_size, *shape), dtype="uint8")).to(where)
    generator = torch.Generator().manual_seed(seed)
    view, alone = Views(), _per_image(shape[1:])
    ready = view(to_float(pixels), generator)

    def speed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        for _ in range(batches):
            work()
        if where.type != "cpu":
            torch.accelerator.synchronize(where)
        return batches * batch_size / (time.perf_counter() - started)

    slow = pixels.cpu()
    contestants: list[tuple[str, Callable[[], object]]] = [
        ("batched", lambda: view(to_float(pixels), generator)),
        ("step", lambda: _pass(network, ready)),
        ("per_image", lambda: torch.stack([alone(image) for image in slow])),
    ]
    measured: list[dict[str, float]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for turn in range(rounds + 1):
            order = contestants[turn % 3 :] + contestants[: turn % 3]
            speeds = {name: speed(work) for name, work in order}
            if turn:
                measured.append(speeds)
                if on_round is not None:
                    on_round(speeds)
    return ViewsBench(
        **{name: statistics.median(speeds[name] for speeds in measured) for name, _ in contestants},
        share=statistics.median(speeds["step"] / (speeds["step"] + speeds["batched"]) for speeds in measured),
        speedup=statistics.median(speeds["batched"] / speeds["per_image"] for speeds in measured),
        goal=GOAL,
        rounds=measured,
        settings={
            "shape": list(shape),
            "model": model,
            "batch_size": batch_size,
            "device": where.type,
            "threads": torch.get_num_threads(),
        },
    )


def _pass(network: nn.Module, views: Tensor) -> None:
    network.zero_grad(set_to_none=True)
    network.features(views).square().mean().backward()  # type: ignore[operator]


def _per_image(size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """What one would write with torchvision: the same crop, flip, jitter and greyscale."""
    from torchvision.transforms import v2

    composed: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=False),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
        ]
    )
    return composed
