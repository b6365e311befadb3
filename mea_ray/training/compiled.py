"""Networks that ``torch.compile`` has compiled, with CUDA graphs where the shapes of batches are fixed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mea_ray.config.training import Compile
from mea_ray.training import device as devices
from mea_ray.training.loader import normalises_batches

BACKEND: Any = "inductor"
"""Backend of ``torch.compile``."""


def compiled(model: nn.Module, setting: Compile) -> nn.Module:
    """Return a network as ``training.compile`` says, with the same weights: itself, compiled, or with CUDA graphs."""
    if not setting:
        return model
    if setting is True:
        return cast(nn.Module, torch.compile(model, backend=BACKEND))
    return FixedShapes(model)


class FixedShapes(nn.Module):
    """A network whose passes are replayed as CUDA graphs, one for each shape of a batch.

    Recording a graph takes as long as many steps. So the last, smaller batch of an epoch is padded to the smallest
    shape of this epoch that holds it, and the outputs of the padding are cut off: they reach no loss, and have no
    gradient. A network with batch normalisation or dropout would see the padding, and has a second graph instead. A
    CPU has no CUDA graphs; it runs the same compiled code.

    Args:
        model: The network: float32 (N, C, H, W) to a tensor (N, ...).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = torch.compile(model, backend=BACKEND, mode="reduce-overhead", dynamic=False)
        self._pads = not (normalises_batches(model) or _draws(model))
        self._sizes = set[int]()

    def start_epoch(self) -> None:
        """Forget the shapes, so that an epoch computes the same in a process that continues a training."""
        self._sizes.clear()

    def start_update(self, where: torch.device) -> None:
        """Let the next pass on a GPU write over what graphs of the last update returned."""
        devices.begin_graphs(where)

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's outputs."""
        count = len(images)
        size = min((size for size in self._sizes if size >= count), default=count) if self._pads else count
        self._sizes.add(size)
        if size == count:
            return cast(Tensor, self.network(images))
        padding = images.new_zeros((size - count, *images.shape[1:]))
        padded = torch.cat([images, padding]).contiguous(memory_format=_layout(images))
        return cast(Tensor, self.network(padded))[:count]

    def __getattr__(self, name: str) -> Any:
        """Give what belongs to the network and is not compiled, such as its features."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


def _layout(images: Tensor) -> torch.memory_format:
    nhwc = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def _draws(model: nn.Module) -> bool:
    return any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in model.modules())
