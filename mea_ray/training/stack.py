"""Networks of one architecture trained together, as one: many small trainings keep a large GPU busy.

The parameters of n networks become tensors with n rows, and ``torch.func.vmap`` runs the network once for all rows.
Everything else is the engine: its optimisers work number by number, so that a row is updated as its network alone
would be. Each row sees its own batches, augmentation and dropout, as its training alone would, and results agree up to
the rounding of other kernels. On a GPU dropout of networks with different seeds draws other masks than each alone.

References:
    https://docs.pytorch.org/tutorials/intermediate/ensembling.html
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mea_ray.config.training import TrainingConfig
from mea_ray.core import seeding
from mea_ray.core.errors import DeviceOutOfMemory, TrainingDiverged
from mea_ray.training import device as devices
from mea_ray.training.engine import TrainReport, results_from, run_training, train
from mea_ray.training.feed import Feed, StackContext, StackFeed
from mea_ray.training.loader import check_data, least_batch
from mea_ray.training.objective import Batch, Objective, OutputLoss, StepContext
from mea_ray.training.precision import autocast_dtype
from mea_ray.training.snapshot import SnapshotFile, training_digest

logger = logging.getLogger(__name__)
_OF = "\N{MIDDLE DOT}"
"""Separates the number of a row from the name of its loss term."""


@dataclass(frozen=True)
class Training:
    """One training that is due: the arguments of ``engine.train``."""

    model: nn.Module
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None
    objective: Objective
    training: TrainingConfig
    seed: int
    validate: Callable[[nn.Module], float] | None = None
    on_epoch: Callable[[dict[str, Any]], None] | None = None
    snapshots: SnapshotFile | None = None

    def run(self) -> TrainReport:
        """Train the model by itself, in place."""
        return train(
            self.model,
            self.images,
            self.labels,
            self.objective,
            self.training,
            seed=self.seed,
            validate=self.validate,
            on_epoch=self.on_epoch,
            snapshots=self.snapshots,
        )

    def fits(self, other: Training) -> bool:
        """Whether two trainings can be rows of one stack; a training that fits not even itself cannot be stacked."""
        one, two = self.objective, other.objective
        return (
            isinstance(one, OutputLoss)
            and isinstance(two, OutputLoss)
            and one.alike(two)
            and self.validate is None
            and other.validate is None
            and not self.training.compile
            and self.training == other.training
            and self.images.shape == other.images.shape
            and _architecture(self.model) == _architecture(other.model)
        )

    def sees_the_same(self, other: Training) -> bool:
        """Whether both see the same batches: equal images, in the same order, equally augmented."""
        if self.seed != other.seed or (self.labels is None) != (other.labels is None):
            return False
        same = self.labels is None or np.array_equal(self.labels, cast("npt.NDArray[np.int64]", other.labels))
        return same and (self.images is other.images or np.array_equal(self.images, other.images))


def train_together(trainings: Sequence[Training]) -> list[TrainReport]:
    """Train several models in place, those that fit each other in stacks of at most ``training.stack``.

    What cannot be stacked is trained by itself: losses that are no ``OutputLoss``, early stopping, ``compile``,
    networks that ``vmap`` cannot take. So is a stack in which a training diverges, since it would take the others with
    it. A stack that does not fit the memory of the GPU is divided.

    Returns:
        A report for each training, in their order. The seconds of a stack are divided evenly among its trainings.

    Raises:
        As ``engine.train``.
    """
    reports: dict[int, TrainReport] = {}
    for places in _groups(trainings):
        for place, report in zip(places, _run([trainings[place] for place in places]), strict=True):
            reports[place] = report
    return [reports[place] for place in range(len(trainings))]


def _groups(trainings: Sequence[Training]) -> list[list[int]]:
    """Return the positions of the trainings of each stack, in the order of their first."""
    groups: list[list[int]] = []
    for place, each in enumerate(trainings):
        open_groups = (group for group in groups if len(group) < each.training.stack and trainings[group[0]].fits(each))
        group = next(open_groups, None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return groups


def _run(trainings: list[Training]) -> list[TrainReport]:
    if len(trainings) == 1:
        return [trainings[0].run()]
    problem = _problem(trainings[:2])
    if problem is not None:
        logger.warning("%d networks are trained one by one, since they cannot be stacked (%s)", len(trainings), problem)
        return [each.run() for each in trainings]
    try:
        return train_stack(trainings)
    except TrainingDiverged:
        logger.warning("one of %d networks trained as a stack diverged; each is trained by itself", len(trainings))
        return [each.run() for each in trainings]
    except DeviceOutOfMemory:
        half = len(trainings) // 2
        logger.warning("a stack of %d networks does not fit the memory of the GPU; it is divided", len(trainings))
    return [*_run(trainings[:half]), *_run(trainings[half:])]


def _problem(trainings: Sequence[Training]) -> str | None:
    """Return why networks cannot be stacked; None if one pass forward and backward works."""
    if autocast_dtype(trainings[0].training.precision, devices.device()) is torch.float16:
        return "in float16 each network has a loss scale of its own; training.precision=float32 can be stacked"
    count = min(2, len(trainings[0].images))
    images = torch.from_numpy(np.ascontiguousarray(trainings[0].images[:count])).float().div_(255)
    with torch.random.fork_rng([]):
        try:
            stack = StackedModel([each.model for each in trainings])
            stack.draw_dropout([each.seed for each in trainings], images.device)
            stack.train()(images).sum().backward()
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def train_stack(trainings: Sequence[Training], *, device: torch.device | None = None) -> list[TrainReport]:
    """Train models that fit each other as one stack, in place; they end on the CPU, in eval mode.

    Args:
        trainings: At least one; see ``Training.fits``.
        device: Where to train; None is the device of this process.

    Raises:
        DataError: As ``engine.train``.
        TrainingDiverged: One of them diverged; no model was changed.
        DeviceOutOfMemory: The stack does not fit the memory of the GPU; no model was changed.
    """
    first, count = trainings[0], len(trainings)
    for each in trainings:
        check_data(each.model, each.images, each.labels)
    shared = all(first.sees_the_same(each) for each in trainings[1:])
    least = least_batch(first.model, first.objective)
    objectives = [cast(OutputLoss, each.objective) for each in trainings]
    stack = StackedModel([each.model for each in trainings])

    def make_feed(where: torch.device, channels_last: bool) -> StackFeed:
        feeds: list[Feed] = []
        for each in trainings:
            same = shared or (each.images is first.images and each.labels is first.labels)
            resident = feeds[0] if feeds and same else None
            given = each.images, each.labels, where, each.training, each.seed
            feeds.append(Feed(*given, least=least, channels_last=channels_last, resident=resident))
        return StackFeed(feeds, shared=shared)

    def identify() -> str:
        names = [
            training_digest(
                (each.images, each.labels),
                {"seed": each.seed, "objective": type(each.objective).__qualname__, **results_from(each.training)},
            )
            for each in trainings
        ]
        return hashlib.sha256(" ".join(["stack", *names]).encode()).hexdigest()

    def on_epoch(record: dict[str, Any]) -> None:
        for row, each in enumerate(trainings):
            if each.on_epoch is not None:
                each.on_epoch(_of_row(record, row, objectives[row]))

    report = run_training(
        stack,
        StackedObjective(objectives, shared=shared),
        first.training,
        make_feed,
        identify,
        seed=first.seed,
        device=device,
        on_epoch=on_epoch,
        snapshots=None if first.snapshots is None else first.snapshots.beside(f"stack-of-{count}"),
        clip=clip_rows,
        streams=partial(stack.draw_dropout, [each.seed for each in trainings]),
    )
    stack.unstack()
    seconds = report.seconds / count
    return [
        replace(report, seconds=seconds, history=[_of_row(record, row, objective) for record in report.history])
        for row, objective in enumerate(objectives)
    ]


def clip_rows(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Scale the gradients of each row to a norm of at most ``limit``, as ``clip_grad_norm_`` does for one network."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (limit / (norms + 1e-6)).clamp_max(1)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


def _architecture(model: nn.Module) -> tuple[str, ...]:
    """Return what networks of one stack have in common: layers with their settings, and all tensors."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return str(model), *(f"{name} {tuple(x.shape)} {x.dtype} {x.requires_grad}" for name, x in tensors)


def _of_row(record: Mapping[str, Any], row: int, objective: Objective) -> dict[str, Any]:
    """Return the record of an epoch as the training of one row would have it."""
    terms, plain = dict[str, float](), dict[str, Any]()
    for name, value in record.items():
        owner, separator, term = name.partition(_OF)
        if not separator:
            plain[name] = value
        elif int(owner) == row:
            terms[term] = value
    loss = sum(objective.weights.get(name, 1.0) * value for name, value in terms.items())
    return {"epoch": plain.pop("epoch"), "epochs": plain.pop("epochs"), **plain, "loss": loss, **terms}


class StackedModel(nn.Module):
    """Networks of one architecture as one, which takes the same images for all, or images for each.

    Args:
        members: The networks, on the CPU. They are left as they are until ``unstack``.

    Attributes:
        template: A network without values, whose layers are those of every row.
    """

    channels_last = False
    members: tuple[nn.Module, ...]
    template: nn.Module

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        first = members[0]
        # Neither is a submodule: only the rows are trained, moved and saved.
        self.__dict__["members"], self.__dict__["template"] = tuple(members), copy.deepcopy(first).to("meta")
        self.rows = nn.Module()
        self._parameters_of, self._buffers_of = dict[str, str](), dict[str, str]()
        for name, parameter in first.named_parameters():
            self._parameters_of[name] = name.replace(".", "/")
            rows = torch.stack([each.get_parameter(name).detach() for each in members])
            self.rows.register_parameter(
                self._parameters_of[name], nn.Parameter(rows, requires_grad=parameter.requires_grad)
            )
        for name, _ in first.named_buffers():
            self._buffers_of[name] = name.replace(".", "/")
            rows = torch.stack([each.get_buffer(name).detach() for each in members])
            self.rows.register_buffer(self._buffers_of[name], rows)
        self._randomness = "same"

    def draw_dropout(self, seeds: Sequence[int], where: torch.device) -> tuple[torch.Generator, ...]:
        """Let each row draw the dropout masks of its own training; return the streams that they come from.

        With equal seeds all rows draw the same masks, from torch's global stream, and there are none.

        Args:
            seeds: Seed of each training.
            where: The device.
        """
        if len(set(seeds)) == 1:
            return ()
        streams = tuple(torch.Generator(where).manual_seed(seeding.derive(seed, "dropout")) for seed in seeds)
        for name, layer in list(self.template.named_modules()):
            if type(layer) in DROPOUT and name:
                parent, _, last = name.rpartition(".")
                setattr(self.template.get_submodule(parent), last, OwnDropout(layer, streams))
        self._randomness = "error"  # of anything else that draws
        return streams

    def train(self, mode: bool = True) -> StackedModel:
        """See torch."""
        self.template.train(mode)
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs of every row.

        Args:
            images: float32, (N, C, H, W) for all n rows, or (N, n, C, H, W).

        Returns:
            What the networks return, (n, N, ...).
        """
        parameters, buffers = (
            {name: getattr(self.rows, stored) for name, stored in names.items()}
            for names in (self._parameters_of, self._buffers_of)
        )

        def of_row(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
            return cast(Tensor, functional_call(self.template, (parameters, buffers), (x,)))

        in_dims = (0, 0, None if images.dim() == 4 else 1)
        return vmap(of_row, in_dims=in_dims, randomness=self._randomness)(parameters, buffers, images)

    def unstack(self) -> None:
        """Copy every row into its network, and set that to eval mode."""
        with torch.no_grad():
            for row, member in enumerate(self.members):
                for name, stored in self._parameters_of.items():
                    member.get_parameter(name).copy_(getattr(self.rows, stored)[row])
                for name, stored in self._buffers_of.items():
                    member.get_buffer(name).copy_(getattr(self.rows, stored)[row])
                member.eval()


class StackedObjective(Objective):
    """The losses of every row; each row's gradient is that of its own losses.

    Args:
        objectives: Of the rows; they are alike.
        shared: Whether a batch is the same for all rows, see ``StackFeed``.
    """

    def __init__(self, objectives: Sequence[OutputLoss], *, shared: bool) -> None:
        super().__init__()
        self.objectives, self.shared = objectives, shared
        self.least_batch = objectives[0].least_batch
        self.resumable = all(each.resumable for each in objectives)
        self.weights = {
            f"{row}{_OF}{name}": weight for row, each in enumerate(objectives) for name, weight in each.weights.items()
        }

    def start(self, context: StepContext) -> None:
        """See the base class."""
        super().start(context)
        assert isinstance(context, StackContext)
        for each, own in zip(self.objectives, context.members, strict=True):
            each.start(own)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of every row, named after it."""
        given = [each.inputs(self._of_row(batch, row)) for row, each in enumerate(self.objectives)]
        images = given[0][0] if self.shared else torch.stack([images for images, _ in given], 1)
        values = vmap(self.objectives[0].losses)(model(images), torch.stack([targets for _, targets in given]))
        return {
            f"{row}{_OF}{name}": value for name, column in values.items() for row, value in enumerate(column.unbind())
        }

    def _of_row(self, batch: Batch, row: int) -> Batch:
        return batch if self.shared else Batch(batch.images[:, row], batch.labels[:, row], batch.indices[:, row])

    def memory(self) -> dict[str, Any]:
        """See the base class."""
        return {"rows": [each.memory() for each in self.objectives]}

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class."""
        for each, own in zip(self.objectives, memory["rows"], strict=True):
            each.recall(own)


DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Layers that can draw the masks of each row."""


class OwnDropout(nn.Module):
    """Dropout under ``vmap`` that draws the mask of each row from a stream of its own.

    Args:
        layer: The layer in place of which it stands, one of ``DROPOUT``.
        streams: One for each row.
    """

    def __init__(self, layer: nn.Module, streams: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.p, self.whole_channels = float(cast(Any, layer).p), not isinstance(layer, nn.Dropout)
        self.streams = streams

    def forward(self, x: Tensor) -> Tensor:
        """Drop numbers, or whole channels, of (N, ...) and scale the others."""
        if not self.training or not self.p:
            return x
        return cast(Tensor, _Masked.apply(x, self))

    def masks(self, rows: Tensor) -> Tensor:
        """Draw factors 0 or 1 / (1 - p) for inputs (n, N, ...), in the order in which each network alone draws."""
        shape = rows.shape[1:3] + (1,) * (rows.dim() - 3) if self.whole_channels else rows.shape[1:]
        drawn = [rows.new_empty(shape).bernoulli_(1 - self.p, generator=stream) for stream in self.streams]
        return torch.stack(drawn).div_(1 - self.p)


class _Masked(torch.autograd.Function):
    """Multiplies the rows of a batch by masks; only its rule for ``vmap`` is used, which is differentiated as usual."""

    @staticmethod
    def forward(x: Tensor, layer: OwnDropout) -> Tensor:
        raise RuntimeError("a row's own dropout works under torch.func.vmap only")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, layer: OwnDropout) -> tuple[Tensor, int]:
        rows = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return rows * layer.masks(rows), 0
