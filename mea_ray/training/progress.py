"""What the training loop tracks: means of the losses, the best weights, and divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mea_ray.core.errors import TrainingDiverged


class LossMeans:
    """Means of the losses over an epoch, weighted by images; raises if a loss is not finite.

    Args:
        every: Steps between two transfers of the values to the CPU. Each transfer stalls a GPU; on a CPU it is free.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.pending: list[tuple[int, int, int, Sequence[str], Tensor]] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, epoch: int, step: int, count: int, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Add the losses of a batch of ``count`` images. Batches may have different terms.

        Raises:
            TrainingDiverged: A loss of this batch, or of one since the last transfer, is not finite.
        """
        values = torch.stack([value.detach().float() for value in (loss, *terms.values())])
        self.pending.append((epoch, step, count, ("loss", *terms), values))
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Transfer and check the values that are pending, see ``add``."""
        fetched = torch.cat([values for *_, values in self.pending]).tolist() if self.pending else []
        for epoch, step, count, names, _ in self.pending:
            values, fetched = dict(zip(names, fetched, strict=False)), fetched[len(names) :]
            if not np.isfinite(list(values.values())).all():
                raise TrainingDiverged(epoch, step, values)
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * count
                self.counts[name] = self.counts.get(name, 0) + count
        self.pending.clear()

    def means(self) -> dict[str, float]:
        """Return the mean of ``loss`` and of each term, and start a new epoch."""
        self.flush()
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class BestWeights:
    """A copy of the weights of the best epoch so far, on the model's device."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.score, self.waited = -np.inf, 0
        self.state: dict[str, Tensor] | None = None

    def update(self, score: float) -> int:
        """Copy the weights if ``score`` is the best so far; return the number of epochs since the best one."""
        self.waited += 1
        if score > self.score:
            self.score, self.waited = score, 0
            self.state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        return self.waited

    def restore(self) -> None:
        """Load the best weights into the model; without any ``update`` it stays as it is."""
        if self.state is not None:
            self.model.load_state_dict(self.state)


def check_weights(model: nn.Module, epoch: int, step: int) -> None:
    """Refuse weights that are not finite. The loss would show them one batch later only.

    Raises:
        TrainingDiverged: A parameter or a buffer is not finite.
    """
    floats = [tensor.detach() for tensor in model.state_dict().values() if tensor.is_floating_point()]
    # One number to fetch: a sum is finite only if all its parts are; in float64 those of float32 cannot overflow.
    if floats and not torch.isfinite(torch.stack([tensor.sum(dtype=torch.float64) for tensor in floats]).sum()):
        raise TrainingDiverged(epoch, step, {})
