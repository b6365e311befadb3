"""The one training loop: victims, null models and substitutes differ in their objective, never in their loop.

Images lie on the device as uint8 and become float32 only after they were augmented there, a batch at a time. The loop
has random streams of its own, so a training is a function of its arguments: on a CPU, bit for bit with the same number
of threads.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mea_ray import seeding
from mea_ray.errors import ConfigError, DataError, TrainingDiverged
from mea_ray.training import device as devices
from mea_ray.training.augment import Augment, to_float
from mea_ray.training.objective import Batch, Objective, StepContext
from mea_ray.training.schedule import factor, make_optimizer

# A GPU is asked for its losses only so often: every question stalls it. A CPU is asked after every step.
STEPS_BETWEEN_CHECKS = 32


@dataclass(frozen=True)
class TrainReport:
    """What a training did.

    Attributes:
        epochs: Epochs trained; fewer than asked after an early stop.
        seconds: Wall time, validation included.
        images: Images of the main task seen, repetitions counted.
        history: What ``on_epoch`` was given, per epoch.
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
        validate: Rates the model after each epoch, higher is better; gets it in eval mode on ``device``.
        on_epoch: Called after each epoch with ``epoch`` (from 1), ``epochs``, ``loss``, the mean of each loss term
            under its name, ``validation`` (None without ``validate``), ``seconds`` and ``learning_rate`` (the last).
        epochs: See ``TrainingConfig``, as for all that follow.
        batch_size: A last, smaller batch is used too, unless it is one image and the model normalises batches.
        optimizer: Fused where torch has it.
        learning_rate: Peak.
        weight_decay: As the optimiser means it.
        momentum: Of sgd.
        schedule: Changed at each update; ``step`` at epochs.
        step_epochs: Of ``step``.
        step_factor: Of ``step``.
        warmup_fraction: Of ``one_cycle``.
        augment: Of the main task's images; objectives are lent the same.
        crop_padding: Pixels.
        gradient_clip: Largest norm of the gradient of one update.
        accumulate_steps: Gradients of as many batches are summed; what is left at an epoch's end is an update too.
        early_stop_patience: Epochs without a better ``validate``; the weights of the best epoch are restored.
        precision: Of the losses' autocast; weights and optimiser are float32.
        channels_last: None is on for a GPU and for bfloat16.
        compile: Compile the network for the loop only.

    Raises:
        DataError: There are no images, or labels or shapes do not fit the model.
        ConfigError: A setting is unknown or impossible.
        TrainingDiverged: A loss or a weight is not finite.
    """
    started = time.perf_counter()
    where = device if device is not None else devices.device()
    check_data(model, images, labels)
    if early_stop_patience is not None and validate is None:
        raise ConfigError(
            f"early_stop_patience={early_stop_patience} needs a validation split; set training.early_stop_patience=null"
        )
    use_bfloat16 = _use_bfloat16(precision, where)
    nhwc = channels_last if channels_last is not None else use_bfloat16 or where.type != "cpu"
    data = _Data(images, labels, where, batch_size, torch.Generator().manual_seed(seeding.derive(seed, "batches")))
    if _normalises_batches(model):
        data.drop_single()
    stream = {
        name: torch.Generator().manual_seed(seeding.derive(seed, name)) for name in ("augment", "lent", "objective")
    }
    augmented = Augment(data.shape, stream["augment"], augment=augment, crop_padding=crop_padding)
    lent = Augment(data.shape, stream["lent"], augment=augment, crop_padding=crop_padding)
    steps = data.steps_per_epoch
    updates_per_epoch = -(-steps // accumulate_steps)
    model.to(where, memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    optimiser = make_optimizer(
        model, where, optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay, momentum=momentum
    )
    network = torch.compile(model) if compile else model
    best = _Best(model)
    losses = _Losses(1 if where.type == "cpu" else STEPS_BETWEEN_CHECKS)
    history: list[dict[str, Any]] = []
    rate, seen = learning_rate, 0

    # Dropout draws from torch's global generator: fork it, so that it is ours inside and untouched outside.
    with torch.random.fork_rng(devices.fork_devices(where)):
        torch.manual_seed(seeding.derive(seed, "dropout"))
        objective.start(
            StepContext(
                where, stream["objective"], lambda x: to_float(lent(x), nhwc), epochs=epochs, steps_per_epoch=steps
            )
        )
        for epoch in range(epochs):
            epoch_started = time.perf_counter()
            model.train()
            objective.start_epoch(epoch)
            optimiser.zero_grad(set_to_none=True)
            for step, (raw, targets, indices) in enumerate(data.epoch()):
                batch = Batch(to_float(augmented(raw), nhwc), targets, indices)
                with torch.autocast(where.type, dtype=torch.bfloat16, enabled=use_bfloat16):
                    terms = objective.terms(network, batch)
                loss = objective.backward(terms, model)
                losses.add(epoch, step, len(indices), loss, terms)
                seen += len(indices)
                if (step + 1) % accumulate_steps and step + 1 < steps:
                    continue
                rate = learning_rate * factor(
                    schedule,
                    epoch * updates_per_epoch + step // accumulate_steps,
                    epochs * updates_per_epoch,
                    epoch,
                    step_epochs=step_epochs,
                    step_factor=step_factor,
                    warmup_fraction=warmup_fraction,
                )
                for group in optimiser.param_groups:
                    group["lr"] = rate
                if gradient_clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            means = losses.means()
            check_weights(model, epoch, steps - 1)
            validation = float(validate(model.eval())) if validate is not None else None
            history.append(
                {"epoch": epoch + 1, "epochs": epochs, **means, "validation": validation}
                | {"seconds": time.perf_counter() - epoch_started, "learning_rate": rate}
            )
            if on_epoch is not None:
                on_epoch(dict(history[-1]))
            if validation is not None and early_stop_patience and best.update(validation) >= early_stop_patience:
                break
    best.restore()
    model.to("cpu", memory_format=torch.contiguous_format).eval()
    return TrainReport(len(history), time.perf_counter() - started, seen, history)


def check_data(model: nn.Module, images: npt.NDArray[Any], labels: npt.NDArray[Any] | None) -> None:
    """Refuse images and labels that a model cannot be trained on.

    Raises:
        DataError: See ``train``; ``model.shape`` and ``model.classes`` are compared where the model has them.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"images must be uint8 (N, C, H, W), got {images.dtype} {images.shape}")
    if not len(images):
        raise DataError("there are no images to train on; check the data's splits (data.splits) and the budget")
    shape = getattr(model, "shape", images.shape[1:])
    if tuple(shape) != images.shape[1:]:
        raise DataError(f"images of shape {images.shape[1:]} do not fit a model for {tuple(shape)}; resize them first")
    if labels is None:
        return
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be int64 ({len(images)},), got {labels.dtype} {labels.shape}")
    classes = getattr(model, "classes", np.iinfo(np.int64).max)
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"labels must lie in [0, {classes}), the classes of the model; got {labels.min()} to {labels.max()}"
        )


def check_weights(model: nn.Module, epoch: int, step: int) -> None:
    """Raise TrainingDiverged unless every parameter and buffer is finite."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    # One number to fetch: a sum is finite only if all its parts are (float64 cannot overflow from float32).
    total = torch.stack([tensor.detach().sum(dtype=torch.float64) for tensor in tensors]).sum() if tensors else None
    if total is not None and not torch.isfinite(total):
        raise TrainingDiverged(epoch, step, {})


def _use_bfloat16(precision: str, where: torch.device) -> bool:
    if precision not in {"auto", "float32", "bfloat16"}:
        raise ConfigError(f"unknown precision {precision!r}; use auto, float32 or bfloat16")
    return precision == "bfloat16" or (precision == "auto" and devices.native_bfloat16(where))


def _normalises_batches(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


class _Data:
    """The training set on the device, as uint8, and its batches in a fresh random order every epoch."""

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64] | None,
        where: torch.device,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        with warnings.catch_warnings():
            # Arrays from an object store are read-only, which torch cannot express; nothing here writes to them.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.images = torch.from_numpy(np.ascontiguousarray(images)).to(where)
        known = np.full(len(images), -1, np.int64) if labels is None else labels.astype(np.int64)
        self.labels = torch.from_numpy(known).to(where)
        self.where, self.batch_size, self.generator = where, batch_size, generator
        self.used = len(images)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.used // self.batch_size)

    def drop_single(self) -> None:
        """Leave out a last batch of one image (another image every epoch): it has no variance to normalise by."""
        if len(self.images) == 1 or self.batch_size == 1:
            raise DataError(
                f"a model with batch normalisation cannot be trained on batches of one image (images: "
                f"{len(self.images)}, batch_size={self.batch_size}); give more images or raise training.batch_size"
            )
        if len(self.images) % self.batch_size == 1:
            self.used = len(self.images) - 1

    def epoch(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)[: self.used].to(self.where)
        for indices in order.split(self.batch_size):
            yield self.images.index_select(0, indices), self.labels.index_select(0, indices), indices


class _Losses:
    """Means over an epoch, weighted by images, and the guard against a loss that is not finite."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.pending: list[tuple[int, int, int, Sequence[str], Tensor]] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, epoch: int, step: int, count: int, loss: Tensor, terms: dict[str, Tensor]) -> None:
        values = torch.stack([loss.detach().float(), *(term.detach().float() for term in terms.values())])
        self.pending.append((epoch, step, count, ("loss", *terms), values))
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        fetched = torch.cat([values for *_, values in self.pending]).tolist() if self.pending else []
        position = 0
        for epoch, step, count, names, _ in self.pending:
            values = dict(zip(names, fetched[position : position + len(names)], strict=True))
            position += len(names)
            if not np.isfinite(list(values.values())).all():
                raise TrainingDiverged(epoch, step, values)
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * count
                self.counts[name] = self.counts.get(name, 0) + count
        self.pending.clear()

    def means(self) -> dict[str, float]:
        """Return the epoch's means and start the next epoch."""
        self.flush()
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class _Best:
    """The weights of the best epoch so far."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.score, self.waited = -np.inf, 0
        self.state: dict[str, Tensor] | None = None

    def update(self, score: float) -> int:
        """Keep the weights if they are better; return the epochs since the best ones."""
        self.waited += 1
        if score > self.score:
            self.score, self.waited = score, 0
            self.state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        return self.waited

    def restore(self) -> None:
        if self.state is not None:
            self.model.load_state_dict(self.state)
