"""The training loop of victims, null models and substitutes. They differ in their objective only.

Images stay on the device as uint8. Each batch is augmented there and then becomes float32. The loop has random streams
of its own, so that a training is a function of its arguments: on a CPU bit for bit, with the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.core import seeding
from mea_ray.core.errors import ConfigError
from mea_ray.training import device as devices
from mea_ray.training.augment import Augment, to_float
from mea_ray.training.loader import Loader, check_data, least_batch
from mea_ray.training.objective import Batch, Objective, StepContext
from mea_ray.training.progress import BestWeights, LossMeans, check_weights
from mea_ray.training.schedule import factor, make_optimizer
from mea_ray.training.snapshot import SnapshotFile, TrainingState

STEPS_BETWEEN_CHECKS = 32
"""Steps between two transfers of the losses from a GPU, which each of them stalls. A CPU's are read at every step."""


@dataclass(frozen=True)
class TrainReport:
    """Summary of a training.

    Attributes:
        epochs: Epochs trained; fewer than configured after an early stop.
        seconds: Wall time, validation included.
        images: Images of the main task seen, repetitions counted.
        history: The record of each epoch, as given to ``on_epoch``.
    """

    epochs: int
    seconds: float
    images: int
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    model: nn.Module,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None,
    objective: Objective,
    *,
    seed: int,
    device: torch.device | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    snapshots: SnapshotFile | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "one_cycle",
    step_epochs: int = 10,
    step_factor: float = 0.5,
    warmup_fraction: float = 0.2,
    augment: tuple[Literal["flip", "crop"], ...] = ("flip", "crop"),
    crop_padding: int = 4,
    gradient_clip: float | None = None,
    accumulate_steps: int = 1,
    early_stop_patience: int | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    channels_last: bool | None = None,
    compile: bool = False,
) -> TrainReport:
    """Train a model in place; it ends on the CPU, in eval mode, its weights contiguous.

    Args:
        model: The network; float32 (N, C, H, W) in [0, 1] to logits.
        images: uint8, (N, C, H, W), N >= 1; not copied on a CPU and never written to.
        labels: int64, (N,); None where they are not known (the objective then sees -1).
        objective: The losses.
        seed: Seed of the batches, augmentation, dropout and the objective's own stream. Initial weights are the
            caller's.
        device: Where to train; None is the device of this process.
        validate: Scores the model after each epoch, higher is better. The model is in eval mode, on ``device``.
        on_epoch: Called after each epoch with ``epoch`` (from 1), ``epochs``, ``loss``, the mean of each loss term
            under its name, ``validation`` (None without ``validate``), ``seconds`` and ``learning_rate`` (the last).
        snapshots: File for snapshots after an epoch, from which the next process that trains the same continues;
            ignored for an objective that is not ``resumable``.
        epochs: See ``TrainingConfig``, as for all that follow.
        batch_size: A last, smaller batch is used too, unless it is one image and fewer than two will not do
            (``least_batch``).
        optimizer: Fused where torch has it.
        learning_rate: Peak.
        weight_decay: As the optimiser means it.
        momentum: Of sgd.
        schedule: Changed at each update; ``step`` at epochs.
        step_epochs: Of ``step``.
        step_factor: Of ``step``.
        warmup_fraction: Of ``one_cycle``.
        augment: Of the main task's images. Objectives may apply the same to their own.
        crop_padding: Pixels.
        gradient_clip: Largest norm of the gradient of one update, the objective's heads included.
        accumulate_steps: Batches whose gradients are summed for one update. What is left at the end of an epoch is an
            update, too.
        early_stop_patience: Epochs without a better ``validate``; the weights of the best epoch are restored.
        precision: Of the losses' autocast; weights and optimiser are float32.
        channels_last: None is on for a GPU, and for bfloat16 unless layers are too narrow (``device.aligned``).
        compile: Compile the network for the loop only.

    Raises:
        DataError: There are no images, or labels or shapes do not fit the model.
        ConfigError: A setting is unknown or impossible.
        TrainingDiverged: A loss or a weight is not finite.
    """
    started = time.perf_counter()
    check_data(model, images, labels)
    if early_stop_patience is not None and validate is None:
        raise ConfigError(
            f"early_stop_patience={early_stop_patience} needs a validation split; set training.early_stop_patience=null"
        )
    where = device if device is not None else devices.device()
    half = use_bfloat16(precision, where)
    nhwc = channels_last if channels_last is not None else where.type != "cpu" or (half and devices.aligned(model))
    order, drawn, lent, own = (
        torch.Generator().manual_seed(seeding.derive(seed, name))
        for name in ("batches", "augment", "lent", "objective")
    )
    data = Loader(images, labels, where, batch_size, order, least=least_batch(model, objective))
    augment_main = Augment(data.shape, drawn, augment=augment, crop_padding=crop_padding)
    augment_lent = Augment(data.shape, lent, augment=augment, crop_padding=crop_padding)
    updates = -(-data.steps // accumulate_steps)

    def rate_of(epoch: int, step: int) -> float:
        update, settings = epoch * updates + step // accumulate_steps, (step_epochs, step_factor, warmup_fraction)
        return learning_rate * factor(schedule, update, epochs * updates, epoch, *settings)

    rate_of(0, 0)  # an unknown schedule is refused before the model moves
    history: list[dict[str, Any]] = []
    seen = 0
    try:
        # Dropout draws from torch's global generator: fork it, so that it is ours inside and untouched outside.
        with devices.retain_freed_memory(), torch.random.fork_rng(devices.fork_devices(where)):
            torch.manual_seed(seeding.derive(seed, "dropout"))
            model.to(where).to(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
            heads = objective.attach(model, where)
            optimiser = make_optimizer(
                model,
                where,
                optimizer=optimizer,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                momentum=momentum,
                heads=heads,
            )
            optimiser.zero_grad(set_to_none=True)
            network = cast(nn.Module, torch.compile(model)) if compile else model
            losses, best = LossMeans(1 if where.type == "cpu" else STEPS_BETWEEN_CHECKS), BestWeights(model)
            objective.start(StepContext(where, own, lambda x: to_float(augment_lent(x), nhwc), epochs, data.steps))
            name = f"{seed}/{epochs}/{len(images)}/{batch_size}/{optimizer}/{learning_rate}"
            file = snapshots if objective.resumable else None
            state = TrainingState(file, name, model, heads, optimiser, (order, drawn, lent, own), best)
            history, seen = state.resume()
            for epoch in range(len(history), epochs):
                epoch_started = time.perf_counter()
                model.train()
                objective.start_epoch(epoch)
                for step, (raw, targets, indices) in enumerate(data):
                    batch = Batch(to_float(augment_main(raw), nhwc), targets, indices)
                    with torch.autocast(where.type, dtype=torch.bfloat16, enabled=half):
                        terms = objective.terms(network, batch)
                    losses.add(epoch, step, len(indices), objective.backward(terms, model), terms)
                    seen += len(indices)
                    if (step + 1) % accumulate_steps and step + 1 < data.steps:
                        continue
                    for group in optimiser.param_groups:
                        group["lr"] = rate_of(epoch, step)
                    if gradient_clip is not None:
                        nn.utils.clip_grad_norm_([*model.parameters(), *heads], gradient_clip)
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                    objective.updated(model)
                means = losses.means()
                check_weights(model, epoch, data.steps - 1)
                validation = float(validate(model.eval())) if validate is not None else None
                summary = {"epoch": epoch + 1, "epochs": epochs, **means, "validation": validation}
                seconds = time.perf_counter() - epoch_started
                history.append({**summary, "seconds": seconds, "learning_rate": optimiser.param_groups[0]["lr"]})
                stop = bool(
                    validation is not None and early_stop_patience and best.update(validation) >= early_stop_patience
                )
                state.epoch_done(history, seen, last=stop)
                if on_epoch is not None:
                    on_epoch(dict(history[-1]))
                if stop:
                    break
            best.restore()
            state.done()
    finally:
        # The layout of the weights changes roundings: a trained model must answer as it does from its checkpoint.
        model.to("cpu").to(memory_format=torch.contiguous_format).eval()
    return TrainReport(len(history), time.perf_counter() - started, seen, history)


def use_bfloat16(precision: str, where: torch.device) -> bool:
    """Whether a precision setting means bfloat16 autocast on a device.

    Raises:
        ConfigError: The setting is unknown.
    """
    if precision not in {"auto", "float32", "bfloat16"}:
        raise ConfigError(f"unknown precision {precision!r}; use auto, float32 or bfloat16")
    return precision == "bfloat16" or (precision == "auto" and devices.native_bfloat16(where))
