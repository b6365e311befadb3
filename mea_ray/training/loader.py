"""The training set as uint8, on the device where it fits, and its batches in random order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mea_ray.core.errors import DataError
from mea_ray.training import device as devices
from mea_ray.training.objective import Objective


class Loader:
    """Batches of a training set, in a fresh random order every epoch.

    Args:
        images: uint8, (N, C, H, W); not copied on a CPU, never written to; may be mapped from a file.
        labels: int64, (N,); None where they are not known: every label is -1 then.
        device: Where batches are wanted.
        batch_size: Images per batch; the last batch of an epoch may be smaller.
        generator: Random stream of the order, on the CPU.
        least: Fewest images in a batch, 1 or 2. With 2, a last batch of one image is left out, another image every
            epoch.
        resident: Whether all images are stored on the device; otherwise each batch is copied there while the one before
            is learnt. None decides by the free memory of the device.
        beside: Another loader of the same images and labels, whose copies are used.

    Raises:
        DataError: Every batch would be a single image, and ``least`` is 2.
    """

    images: Tensor
    labels: Tensor
    resident: bool

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64] | None,
        device: torch.device,
        batch_size: int,
        generator: torch.Generator,
        *,
        least: int,
        resident: bool | None = None,
        beside: Loader | None = None,
    ) -> None:
        count = len(images)
        if min(count, batch_size) < least:
            raise DataError(
                f"batch normalisation and losses that compare images cannot learn from batches of one image (images: "
                f"{count}, batch_size={batch_size}); give more images or raise training.batch_size"
            )
        if beside is not None:
            self.images, self.labels, self.resident = beside.images, beside.labels, beside.resident
        else:
            self._place(images, labels, device, resident)
        self.device, self.batch_size, self.generator = device, batch_size, generator
        self.used = count - 1 if count % batch_size == 1 and least > 1 else count
        self.steps = -(-self.used // batch_size)

    def _place(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64] | None,
        device: torch.device,
        resident: bool | None,
    ) -> None:
        with warnings.catch_warnings():
            # Arrays from an object store are read-only, which torch cannot express; nothing here writes to them.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.images = torch.from_numpy(np.ascontiguousarray(images))
        self.resident = devices.fits(images.nbytes, device) if resident is None else resident
        if self.resident:
            self.images = self.images.to(device)
        known = np.full(len(images), -1, np.int64) if labels is None else labels.astype(np.int64)
        self.labels = torch.from_numpy(known).to(device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield one epoch's batches: uint8 images (n, C, H, W), int64 labels (n,), int64 positions (n,)."""
        order = torch.randperm(len(self.images), generator=self.generator)[: self.used]
        for chosen in torch.split(order.to(self.device if self.resident else "cpu"), self.batch_size):
            indices, images = chosen, self.images.index_select(0, chosen)
            if not self.resident:
                indices, images = devices.send(chosen, self.device), devices.send(images, self.device)
            yield images, self.labels.index_select(0, indices), indices


def check_data(model: nn.Module, images: npt.NDArray[Any], labels: npt.NDArray[Any] | None) -> None:
    """Check that a model can be trained on images and labels.

    Args:
        model: Its ``shape`` and ``classes``, if it has them, must fit the data.
        images: uint8, (N, C, H, W), N >= 1.
        labels: Integers in [0, classes), (N,), or None.

    Raises:
        DataError: A type, a shape or a label does not fit.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise DataError(f"images must be uint8 (N, C, H, W), got {images.dtype} {images.shape}")
    if not len(images):
        raise DataError("there are no images to train on; check data.splits and the budget")
    shape = tuple(getattr(model, "shape", images.shape[1:]))
    if shape != images.shape[1:]:
        raise DataError(f"images of shape {images.shape[1:]} do not fit a model for {shape}; resize them first")
    if labels is None:
        return
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be int64 ({len(images)},), got {labels.dtype} {labels.shape}")
    classes = getattr(model, "classes", np.iinfo(np.int64).max)
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(f"labels must lie in [0, {classes}), as the model's do; got {labels.min()} to {labels.max()}")


def least_batch(model: nn.Module, objective: Objective) -> int:
    """Return the fewest images in a batch that a model can be trained on for an objective, 1 or 2."""
    return 2 if normalises_batches(model) else objective.least_batch


def normalises_batches(model: nn.Module) -> bool:
    """Whether a model has batch normalisation, which cannot be trained on a batch of one image."""
    layers: nn.Module = getattr(model, "template", model)  # a stack has the layers of its template
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in layers.modules())
