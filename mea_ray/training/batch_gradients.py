"""Batches that do not fit into GPU memory: they are tried again, then split into ever smaller parts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mea_ray.core.errors import DeviceOutOfMemory
from mea_ray.training import device as devices
from mea_ray.training.compiled import FixedShapes
from mea_ray.training.loader import least_batch
from mea_ray.training.objective import Batch, Objective

logger = logging.getLogger(__name__)


class BatchGradients:
    """Gradients of the batches of one update; where memory runs out, the update is begun again.

    The first retry frees what this process does not use: another one may have released its memory, too. If that does
    not help, batches are split into two parts from then on, then into four, and so on. The gradient of a batch is the
    mean over its parts, weighted by their images. For losses that are means over images it is that of the whole batch,
    up to rounding. Batch normalisation takes the statistics of the parts, and its running statistics count a failed
    pass, too. Samples that an objective draws for each batch are drawn for each part.

    Args:
        model: What is trained; ``network`` may be its compiled form.
        network: What the objective calls.
        objective: The losses. One that contrasts images with each other (``least_batch`` of 2) is another loss on
            parts, so that its batches are never divided.
        optimiser: Its optimiser, which forgets the gradients of an update that is begun again.
        where: The device.
        dtype: What autocast computes losses in; None without autocast.
        scaler: Scales the losses whose gradients are computed, see ``precision.loss_scale``.
        generators: Random streams that a step draws from, beside torch's global ones: an update that is begun again
            draws the same.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        objective: Objective,
        optimiser: torch.optim.Optimizer,
        where: torch.device,
        dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler,
        generators: Sequence[torch.Generator],
    ) -> None:
        self.model, self.network, self.objective, self.optimiser = model, network, objective, optimiser
        self.where, self.dtype, self.scaler, self.generators = where, dtype, scaler, generators
        self.parts = 1
        """Parts that a batch is learnt in."""
        self._least = least_batch(model, objective)
        self._divisible = objective.least_batch == 1
        self._batches: list[Batch] = []

    def start_epoch(self) -> None:
        """Begin an epoch."""
        if isinstance(self.network, FixedShapes):
            self.network.start_epoch()

    def add(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Add a batch's gradients to those of the update; return its loss and its terms, scalars without a graph.

        Raises:
            DeviceOutOfMemory: It does not fit even in the smallest parts.
        """
        if not self._batches:
            if isinstance(self.network, FixedShapes):
                self.network.start_update(self.where)
            self._streams = devices.random_state(self.where, self.generators)
        self._batches.append(batch)
        losses = self._attempt([batch])
        if losses is None:
            losses = self._again()
        return losses

    def updated(self) -> None:
        """Begin the next update."""
        self._batches.clear()

    def _again(self) -> tuple[Tensor, dict[str, Tensor]]:
        size = max(len(batch.indices) for batch in self._batches)
        for parts in self._divisions(size):
            if parts > self.parts:
                logger.warning(
                    "the GPU ran out of memory: batches of %d images are learnt in %d parts from here on; gradients "
                    "are the same up to rounding, batch normalisation and what is drawn for each part",
                    size,
                    parts,
                )
            self.parts = parts
            devices.free_memory()
            self.optimiser.zero_grad(set_to_none=True)
            devices.set_random_state(self.where, self.generators, self._streams)
            losses = self._attempt(self._batches)
            if losses is not None:
                return losses
        learnt = "" if self.parts == 1 else f", learnt in {self.parts} parts"
        raise DeviceOutOfMemory(f"a batch of {size} images{learnt}")

    def _divisions(self, size: int) -> Iterator[int]:
        parts = self.parts
        yield parts
        while self._divisible and size // (parts := 2 * parts) >= self._least:
            yield parts

    def _attempt(self, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return loss and terms of the last batch; None if memory ran out.

        The error is not passed on: its traceback would keep alive what has to be freed.
        """
        try:
            return [self._gradients(batch) for batch in batches][-1]
        except torch.OutOfMemoryError:
            return None

    def _gradients(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.parts == 1:
            terms = self._terms(batch)
            return self._backward(terms), terms
        count = len(batch.indices)
        loss, sums = torch.zeros((), device=self.where), dict[str, Tensor]()
        divided = (tensor.tensor_split(self.parts) for tensor in (batch.images, batch.labels, batch.indices))
        for part in map(Batch, *divided):
            share = len(part.indices) / count
            terms = {name: term * share for name, term in self._terms(part).items()}
            loss = loss + self._backward(terms)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.detach()
        return loss, sums

    def _backward(self, terms: dict[str, Tensor]) -> Tensor:
        """Accumulate gradients, of scaled losses where losses are scaled; return the loss as it is without a scale."""
        if not self.scaler.is_enabled():
            return self.objective.backward(terms, self.model)
        scaled = {name: self.scaler.scale(term) for name, term in terms.items()}
        return self.objective.backward(scaled, self.model) / self.scaler.get_scale()

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self.where.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return self.objective.terms(self.network, batch)
