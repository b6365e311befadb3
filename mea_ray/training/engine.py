"""The training loop of victims, null models and substitutes. They differ in their objective only.

Images stay on the device as uint8. Each batch is augmented there and then becomes float32. The loop has random streams
of its own, so that a training is a function of its arguments: on a CPU bit for bit, with the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.config.training import TrainingConfig
from mea_ray.core import seeding
from mea_ray.core.errors import ConfigError
from mea_ray.training import device as devices
from mea_ray.training.batch_gradients import BatchGradients
from mea_ray.training.compiled import compiled
from mea_ray.training.feed import Feed, StackFeed
from mea_ray.training.loader import check_data, least_batch
from mea_ray.training.objective import Objective
from mea_ray.training.precision import loss_scale, step_dtype
from mea_ray.training.progress import BestWeights, LossMeans, check_weights
from mea_ray.training.schedule import make_optimizer
from mea_ray.training.snapshot import SnapshotFile, TrainingState, training_digest
from mea_ray.training.updates import Clip, Updates

STEPS_BETWEEN_CHECKS = 32
"""Steps between transfers of the losses from a GPU, because each transfer stalls it. On a CPU they are read at every
step."""


@dataclass(frozen=True)
class TrainReport:
    """Summary of a training.

    Attributes:
        epochs: Epochs trained; fewer than configured after an early stop.
        seconds: Wall time, validation included, and that of earlier processes which it continues.
        images: Images of the main task seen, repetitions counted.
        history: The record of each epoch, as given to ``on_epoch``.
        parts: Parts that batches were learnt in at the end; more than 1 where a GPU lacked memory, see
            ``BatchGradients``.
    """

    epochs: int
    seconds: float
    images: int
    history: list[dict[str, Any]] = field(default_factory=list)
    parts: int = 1


def train(
    model: nn.Module,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None,
    objective: Objective,
    training: TrainingConfig,
    *,
    seed: int,
    device: torch.device | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    snapshots: SnapshotFile | None = None,
) -> TrainReport:
    """Train a model in place; it ends on the CPU, in eval mode, its weights contiguous.

    Args:
        model: The network; float32 (N, C, H, W) in [0, 1] to logits.
        images: uint8, (N, C, H, W), N >= 1; not copied on a CPU and never written to.
        labels: int64, (N,); None where they are not known (the objective then sees -1).
        objective: The losses.
        training: The settings. Objectives may apply the same augmentation to their own images. A last, smaller batch is
            used, too, unless it is one image and fewer than two will not do (``least_batch``). Batches that are left
            over from ``accumulate_steps`` at the end of an epoch are an update, too.
        seed: Seed of the batches, augmentation, dropout and the objective's own stream. Initial weights are the
            caller's.
        device: Where to train; None is the device of this process.
        validate: Scores the model after each epoch, higher is better. The model is in eval mode, on ``device``.
        on_epoch: Called after each epoch with ``epoch`` (from 1), ``epochs``, ``loss``, the mean of each loss term
            under its name, ``validation`` (None without ``validate``), ``seconds`` and ``learning_rate`` (the last).
            A training that continues from a snapshot first calls it with that epoch's record again, and the number of
            ``resumed`` epochs.
        snapshots: File for snapshots after an epoch, from which the next process that trains the same continues;
            ignored for an objective that is not ``resumable``.

    Raises:
        DataError: There are no images, or labels or shapes do not fit the model.
        ConfigError: ``early_stop_patience`` without ``validate``, or a crop that the images are too small for.
        TrainingDiverged: A loss or a weight is not finite.
        DeviceOutOfMemory: Batches do not fit the memory of the GPU even in the smallest parts.
    """
    check_data(model, images, labels)
    if training.early_stop_patience is not None and validate is None:
        raise ConfigError(
            f"early_stop_patience={training.early_stop_patience} needs a validation split; set "
            "training.early_stop_patience=null"
        )

    def feed(where: torch.device, channels_last: bool) -> Feed:
        least = least_batch(model, objective)
        return Feed(images, labels, where, training, seed, least=least, channels_last=channels_last)

    settings = {"seed": seed, "objective": type(objective).__qualname__, **results_from(training)}
    return run_training(
        model,
        objective,
        training,
        feed,
        partial(training_digest, (images, labels), settings),
        seed=seed,
        device=device,
        validate=validate,
        on_epoch=on_epoch,
        snapshots=snapshots,
    )


def run_training(
    model: nn.Module,
    objective: Objective,
    training: TrainingConfig,
    make_feed: Callable[[torch.device, bool], Feed | StackFeed],
    identify: Callable[[], str],
    *,
    seed: int,
    device: torch.device | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    snapshots: SnapshotFile | None = None,
    clip: Clip = nn.utils.clip_grad_norm_,
    streams: Callable[[torch.device], Sequence[torch.Generator]] = lambda where: (),
) -> TrainReport:
    """Run the loop of ``train``, whose arguments are not explained again, on one network or on a stack of several.

    Args:
        model: See ``train``.
        objective: See ``train``.
        training: See ``train``.
        make_feed: Makes the batches on a device, and in the memory format channels last or not.
        identify: Names the training beside its initial weights, see ``TrainingState``.
        seed: Seed of dropout.
        device: See ``train``.
        validate: See ``train``.
        on_epoch: See ``train``.
        snapshots: See ``train``.
        clip: Cuts the gradients of parameters to a norm.
        streams: Prepares the model's own random streams on a device, where it has any beside torch's global ones.
    """
    started = time.perf_counter()
    epochs, patience = training.epochs, training.early_stop_patience
    where = device if device is not None else devices.device()
    dtype = step_dtype(training.precision, where, objective)
    nhwc = _channels_last(model, training, where, dtype)
    data = make_feed(where, nhwc)
    history: list[dict[str, Any]] = []
    seen = 0
    try:
        # Dropout draws from torch's global generator: fork it, so that it is ours inside and untouched outside.
        with (
            devices.retain_freed_memory(),
            devices.tf32(where, enabled=training.precision == "tf32"),
            torch.random.fork_rng(devices.fork_devices(where)),
        ):
            torch.manual_seed(seeding.derive(seed, "dropout"))
            model.to(where).to(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
            heads = objective.attach(model, where)
            optimiser = make_optimizer(model, where, training, heads, scaled=dtype is torch.float16)
            optimiser.zero_grad(set_to_none=True)
            network, scaler, own = compiled(model, training.compile), loss_scale(where, dtype), streams(where)
            drawn = (*data.step_generators, *own)
            gradients = BatchGradients(model, network, objective, optimiser, where, dtype, scaler, drawn)
            updates = Updates([*model.parameters(), *heads], optimiser, scaler, training, data.steps, clip)
            losses, best = LossMeans(1 if where.type == "cpu" else STEPS_BETWEEN_CHECKS), BestWeights(model)
            objective.start(data.context(epochs))
            file, generators = snapshots if objective.resumable else None, (*data.generators, *own)
            state = TrainingState(file, identify, model, heads, optimiser, generators, best, objective, scaler)
            history, seen = state.resume(on_epoch)
            for epoch in range(len(history), len(history) if state.finished else epochs):
                epoch_started = time.perf_counter()
                model.train()
                objective.start_epoch(epoch)
                gradients.start_epoch()
                for step, batch in enumerate(data):
                    losses.add(epoch, step, len(batch.indices), *gradients.add(batch))
                    seen += len(batch.indices)
                    if updates.due(step):
                        updates.make(epoch, step)
                        gradients.updated()
                        objective.updated(model)
                means = losses.means()
                check_weights(model, epoch, data.steps - 1)
                validation = float(validate(model.eval())) if validate is not None else None
                timing = {"seconds": time.perf_counter() - epoch_started, "learning_rate": updates.learning_rate}
                history.append({"epoch": epoch + 1, "epochs": epochs, **means, "validation": validation, **timing})
                stop = validation is not None and patience is not None and best.update(validation) >= patience
                state.epoch_done(history, seen, last=stop)
                if on_epoch is not None:
                    on_epoch(dict(history[-1]))
                if stop:
                    break
            state.done(history, seen)
    finally:
        # The layout of the weights changes roundings: a trained model must answer as it does from its checkpoint.
        model.to("cpu").to(memory_format=torch.contiguous_format).eval()
    return TrainReport(len(history), state.seconds + time.perf_counter() - started, seen, history, gradients.parts)


def _channels_last(model: nn.Module, training: TrainingConfig, where: torch.device, dtype: torch.dtype | None) -> bool:
    """Return whether a network is trained in the memory format channels last: as set, else where it is faster."""
    if not getattr(model, "channels_last", True):
        return False
    if training.channels_last is not None:
        return training.channels_last
    return where.type != "cpu" or (dtype is torch.bfloat16 and devices.aligned(model))


def results_from(training: TrainingConfig) -> dict[str, Any]:
    """Return the settings that a training's result follows from, as JSON values; not how it is put beside others."""
    return training.model_dump(mode="json", exclude={"stack"})
