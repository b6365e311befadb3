"""How much slower is embedding a watermark than plain training? Both are run in turns, on the same images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mea_ray.config.training import Compile, Precision, TrainingConfig
from mea_ray.core import seeding
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import ImageSet
from mea_ray.data import DATASETS
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training import device as devices
from mea_ray.training.augment import Augment, to_float
from mea_ray.training.engine import train
from mea_ray.training.objective import CrossEntropy
from mea_ray.training.precision import autocast_dtype, loss_scale
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key, Watermark

GOAL = 0.6
"""Watermarked training should reach this part of the plain loop's speed."""


@dataclass(frozen=True)
class TrainBench:
    """Speeds in images of the main task per second; each is the median over the rounds.

    Attributes:
        plain: A hand-written loop with cross-entropy.
        engine: The engine with cross-entropy.
        watermark: The engine with the watermark's own stages.
        engine_ratio: Median over the rounds of engine / plain.
        watermark_ratio: Median over the rounds of watermark / plain.
        goal: What ``watermark_ratio`` should reach.
        rounds: The speeds of each round, in the order in which they were measured.
        settings: What was measured: model, shape, batch size, device, threads, precision.
    """

    plain: float
    engine: float
    watermark: float
    engine_ratio: float
    watermark_ratio: float
    goal: float
    rounds: list[dict[str, float]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def bench_train(
    *,
    data: str = "synthetic",
    data_params: Mapping[str, Any] | None = None,
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    model: str = "vgg_like",
    model_params: Mapping[str, Any] | None = None,
    watermark: str = "mea_defender",
    watermark_params: Mapping[str, Any] | None = None,
    steps: int = 30,
    rounds: int = 5,
    batch_size: int = 128,
    precision: Precision = "auto",
    compile: Compile = False,
    seed: int = 0,
    on_round: Callable[[dict[str, float]], None] | None = None,
) -> TrainBench:
    """Measure the plain loop, the engine, and the engine with a watermark, one after the other in every round.

    A machine's speed drifts; what is compared is run side by side, in an order that turns from round to round, and a
    first round that warms the machine up is not counted.

    Args:
        data: ``synthetic`` (random images: speed does not depend on what they show) or a name in the table of datasets.
        data_params: Parameters of the dataset.
        shape: (channels, height, width) of synthetic images.
        classes: Classes of synthetic images.
        model: Name in the table of models.
        model_params: Parameters of the model.
        watermark: Name in the table of watermarks.
        watermark_params: Parameters of the watermark; its defaults are the point of the measurement, but for a warm-up:
            all losses are on in every step that is measured.
        steps: Steps of each measurement.
        rounds: Counted rounds.
        batch_size: Images of the main task per step.
        precision: As ``training.precision``.
        compile: As ``training.compile``, for the engine with and without the watermark; the time to compile counts, so
            that it takes many steps.
        seed: Seed of images, weights and batches.
        on_round: Called with the speeds of each counted round.

    Raises:
        ConfigError: A name, a parameter, or a count below 1.
        DataError: The dataset is missing or has fewer images than one step takes.
    """
    for name, count in {"steps": steps, "rounds": rounds, "batch_size": batch_size}.items():
        if count < 1:
            raise ConfigError(f"{name}={count} must be at least 1")
    images = _images(data, data_params or {}, shape, classes, steps * batch_size, seed)
    if len(images) < batch_size:
        raise DataError(f"{data!r} has {len(images)} training images, less than one batch of {batch_size}; lower it")
    images = images.take(np.arange(len(images) // batch_size * batch_size))
    steady = {"warmup": 0.0} if any(known.name == "warmup" for known in WATERMARKS.parameters(watermark)) else {}
    scheme: Watermark = WATERMARKS.build(watermark, **{**steady, **(watermark_params or {})})
    key = scheme.make_key(images, seed)
    epochs = max(1, steps * batch_size // len(images))
    training = TrainingConfig(batch_size=batch_size, precision=precision, compile=compile, epochs=epochs)

    def fresh() -> ImageModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.derive(seed, "weights"))
            return build_model(model, images.shape, images.classes, model_params)

    contestants: list[tuple[str, Callable[[], float]]] = [
        ("plain", lambda: _plain(fresh(), images, training, seed)),
        ("engine", lambda: _engine(fresh(), images, seed, training)),
        ("watermark", lambda: _watermark(fresh(), scheme, key, images, seed, training)),
    ]
    measured: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        order = contestants[turn % 3 :] + contestants[: turn % 3]
        # All of them with the engine's memory setting: what is compared is the losses, not the allocator.
        with devices.retain_freed_memory():
            speeds = {name: run() for name, run in order}
        if turn:  # the first one warms up
            measured.append(speeds)
            if on_round is not None:
                on_round(speeds)
    where = devices.device()
    return TrainBench(
        **{name: statistics.median(speeds[name] for speeds in measured) for name, _ in contestants},
        engine_ratio=statistics.median(speeds["engine"] / speeds["plain"] for speeds in measured),
        watermark_ratio=statistics.median(speeds["watermark"] / speeds["plain"] for speeds in measured),
        goal=GOAL,
        rounds=measured,
        settings={
            "data": data,
            "shape": list(images.shape),
            "model": model,
            "watermark": watermark,
            "batch_size": batch_size,
            "steps": epochs * len(images) // batch_size,
            "device": where.type,
            "threads": torch.get_num_threads(),
            "compile": compile,
            "autocast": str(autocast_dtype(precision, where)),
        },
    )


def _images(
    data: str, params: Mapping[str, Any], shape: tuple[int, int, int], classes: int, count: int, seed: int
) -> ImageSet:
    if data != "synthetic":
        train_set: ImageSet = DATASETS.build(data, **params).train
        return train_set.take(np.arange(min(count, len(train_set))))
    rng = seeding.numpy_generator(seed, "bench", "images")
    labels = rng.permutation(np.arange(max(count, classes)) % classes)
    images = rng.integers(0, 256, size=(len(labels), *shape), dtype=np.uint8)
    return ImageSet(images, labels.astype(np.int64), tuple(str(label) for label in range(classes)))


def _synchronize(where: torch.device) -> None:
    if where.type != "cpu":
        torch.accelerator.synchronize(where)


def _plain(model: ImageModel, images: ImageSet, training: TrainingConfig, seed: int) -> float:
    """Run what one would write without an engine; the same augmentation, precision and memory format."""
    where = devices.device()
    started = time.perf_counter()
    dtype = autocast_dtype(training.precision, where)
    scaler = loss_scale(where, dtype)
    nhwc = dtype is torch.bfloat16 or where.type != "cpu"
    model = model.to(where).to(memory_format=torch.channels_last if nhwc else torch.contiguous_format).train()
    pixels, labels = torch.from_numpy(images.images).to(where), torch.from_numpy(images.labels).to(where)
    augment = Augment(images.shape, torch.Generator().manual_seed(seed), augment=("flip", "crop"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in range(training.epochs):
        for indices in torch.randperm(len(pixels)).to(where).split(training.batch_size):  # type: ignore[no-untyped-call]
            batch = to_float(augment(pixels[indices]), nhwc)
            with torch.autocast(where.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = F.cross_entropy(model(batch).float(), labels[indices])
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
    _synchronize(where)
    return training.epochs * len(pixels) / (time.perf_counter() - started)


def _engine(model: ImageModel, images: ImageSet, seed: int, training: TrainingConfig) -> float:
    report = train(model, images.images, images.labels, CrossEntropy(), training, seed=seed)
    return report.images / report.seconds


def _watermark(
    model: ImageModel, scheme: Watermark, key: Key | None, images: ImageSet, seed: int, training: TrainingConfig
) -> float:
    """Run every stage once, each for as many epochs as the others were run, whatever its own settings say."""
    seen, seconds = 0, 0.0
    for stage in scheme.stages(key, images):
        chosen = training.changed(**{k: v for k, v in stage.overrides.items() if k not in {"epochs", "batch_size"}})
        report = train(model, stage.train.images, stage.train.labels, stage.objective, chosen, seed=seed)
        seen, seconds = seen + report.images, seconds + report.seconds
    return seen / seconds
