"""What a training step minimises: the interface between the training engine and watermarks, attacks and pretext tasks.

The engine owns the loop, the data, the device and the optimiser. An objective owns the losses. Watermarks and attacks
define objectives of their own, but no loops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One batch of the main task, on the training device.

    Attributes:
        images: float32, (N, C, H, W), in [0, 1], augmented.
        labels: int64, (N,); -1 where labels are not known, as for a thief.
        indices: int64, (N,); positions in the training set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class StepContext:
    """What the engine provides to an objective.

    Attributes:
        device: Where the losses are computed.
        generator: Random stream on the CPU, seeded by the engine; the only one that an objective may use.
        augment: uint8 (N, C, H, W) on ``device`` to augmented float32 in [0, 1], as the main batch is augmented.
        epochs: Number of epochs to come.
        steps_per_epoch: Batches in an epoch.
    """

    device: torch.device
    generator: torch.Generator
    augment: Callable[[Tensor], Tensor]
    epochs: int
    steps_per_epoch: int


def merged(parts: Sequence[Tensor]) -> Tensor:
    """Join batches of images for one pass: float32 (sum of N_i, C, H, W), in the memory format of the first."""
    joined = torch.cat([part.float() for part in parts])
    if parts[0].is_contiguous(memory_format=torch.channels_last):
        return joined.contiguous(memory_format=torch.channels_last)
    return joined


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a module, those too that its ``state_dict`` leaves out."""
    return {name: value.detach() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy what ``module_state`` returned into a module of the same kind."""
    with torch.no_grad():
        for name, value in module_state(module).items():
            value.copy_(state[name])


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add a gradient of the parameter's shape to its ``.grad``, in the memory layout of the parameter.

    ``backward`` keeps that layout, ``torch.autograd.grad`` does not. A fused optimiser walks through the memory of
    both, so that with another layout it updates weights by the gradients of others.
    """
    with torch.no_grad():
        laid_out = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = laid_out if parameter.grad is None else parameter.grad + laid_out


class Objective(ABC):
    """Named loss terms, and how they become one gradient.

    The engine calls ``attach`` and ``start`` once, and ``start_epoch`` before every epoch. For each batch it calls
    ``terms`` (under autocast) and ``backward`` (outside of it). ``updated`` follows every update of the weights.
    """

    weights: dict[str, float]
    """Weight of each term in the default ``backward``. A missing term has weight 1."""
    least_batch: int = 1
    """Fewest images that its losses and heads can learn from; 2 for losses that contrast images with each other."""
    resumable: bool = False
    """Whether a training can continue from a snapshot after an epoch: what changes from epoch to epoch is the weights,
    the parameters of ``attach``, ``context.generator``, and what ``memory`` returns, and nothing else."""

    def __init__(self) -> None:
        self.weights = {}

    @property
    def sums_terms(self) -> bool:
        """Whether ``backward`` computes the gradient of the sum of the weighted terms, and nothing else.

        Then multiples of the terms have the same multiples of the gradient, which training in float16 needs.
        """
        return type(self).backward is Objective.backward

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Build heads that are trained with the model, e.g. a projection head, on the device; return their parameters.

        Called once, with the model on the device and torch's global generator seeded, before the optimiser is made.
        """
        return []

    def start(self, context: StepContext) -> None:
        """Move tensors that the losses need to the device. Called once, before the first epoch."""
        self.context = context

    def start_epoch(self, epoch: int) -> None:  # noqa: B027 - an optional hook
        """Update schedules. ``epoch`` counts from 0."""

    @abstractmethod
    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms of one batch, each a scalar tensor with its graph."""

    def backward(self, terms: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Accumulate gradients into ``model`` and return the detached scalar that is reported as the loss."""
        total = sum(self.weights.get(name, 1.0) * term for name, term in terms.items())
        assert isinstance(total, Tensor)
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    def updated(self, model: nn.Module) -> None:  # noqa: B027 - an optional hook
        """React to an update of the weights, e.g. move a momentum encoder."""

    def memory(self) -> dict[str, Any]:
        """Return what else the next epoch depends on: tensors, plain values, and lists and dicts of them."""
        return {}

    def recall(self, memory: dict[str, Any]) -> None:  # noqa: B027 - an optional hook
        """Take over what ``memory`` returned in another process. Called after ``attach`` and ``start``.

        Raises:
            ArtifactError: It does not fit what is at hand; the training then begins anew. Nothing was changed.
        """


class OutputLoss(Objective):
    """Losses of what a network returns for one batch of images, and of targets.

    A subclass writes ``inputs`` and ``losses`` in place of ``terms``. Trainings of such objectives can be stacked, see
    ``training.stack``, as long as no other method than ``start``, ``memory`` and ``recall`` is overridden.
    """

    settings: Any = None
    """What ``losses`` depends on: objectives of one class with equal settings have the same losses."""

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the images that the network is to see, float32 (N, C, H, W), and the targets, (N, ...)."""

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss terms of the network's outputs, (N, ...): scalars. ``torch.func.vmap`` must take it."""

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the model on the inputs."""
        images, targets = self.inputs(batch)
        return self.losses(model(images), targets)

    def alike(self, other: Objective) -> bool:
        """Whether another objective, in a stack with this one, has the same losses."""
        return type(self) is type(other) and self.settings == other.settings and self._only_losses()

    def _only_losses(self) -> bool:
        hooks = ("attach", "start_epoch", "backward", "updated")
        return all(getattr(type(self), name) is getattr(Objective, name) for name in hooks) and (
            type(self).terms is OutputLoss.terms
        )


class CrossEntropy(OutputLoss):
    """Mean cross-entropy with the labels."""

    resumable = True

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images and labels."""
        return batch.images, batch.labels

    def losses(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return ``{"utility": mean cross-entropy}``."""
        return {"utility": F.cross_entropy(outputs.float(), targets)}
