"""Layers that compute a minimum number of rows, so that a single image has the same bits as in a batch.

Libraries compute one or two rows with other routines than many rows, which sum in another order. That affects only some
layers of a network. A few more rows in these layers cost little, while padding the whole pass would cost as much as
more images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SUMMING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LeastRows:
    """Hooks of one layer: missing rows are added as zeros before the layer, and removed after it.

    Attributes:
        rows: Minimum number of rows.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.rows, self._count = 1, 0
        layer.register_forward_pre_hook(self._pad)
        layer.register_forward_hook(self._cut)

    def _pad(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self._count = len(args[0])
        if self._count >= self.rows:
            return None
        zeros = args[0].new_zeros((self.rows - self._count, *args[0].shape[1:]))
        return (torch.cat([args[0], zeros]), *args[1:])

    def _cut(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return None if self._count >= self.rows else output[: self._count]


def need_least_rows(model: nn.Module, full_pass: Callable[[], object]) -> None:
    """Find each layer's minimum number of rows with the bits of a full pass, and make it compute that many.

    Each number is tried at every position in the rows of a full pass.

    Args:
        model: The network; its layers get hooks.
        full_pass: Computes a full pass of the model.
    """
    layers = [module for module in model.modules() if type(module) in _SUMMING]
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[layer].append((args[0], output))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        full_pass()
    finally:
        for hook in hooks:
            hook.remove()
    for layer, calls in seen.items():
        least = max((_least_rows(layer, *call) for call in calls), default=1)
        if least > 1:
            LeastRows(layer).rows = least


def _least_rows(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Return the smallest power of two of rows with the same bits as all rows at once; else the number of all rows."""
    rows = 1
    while rows < len(x):
        starts = range(0, len(x), rows)
        if all(torch.equal(layer(x[low : low + rows]), output[low : low + rows]) for low in starts):
            return rows
        rows *= 2
    return len(x)
