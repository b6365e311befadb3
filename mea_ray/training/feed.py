"""The augmented batches and the random streams of one training, or of several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mea_ray.config.training import TrainingConfig
from mea_ray.core import seeding
from mea_ray.training.augment import Augment, to_float
from mea_ray.training.loader import Loader
from mea_ray.training.objective import Batch, StepContext


class Feed:
    """The batches of one training, and the random streams that follow from its seed.

    Args:
        images: uint8, (N, C, H, W).
        labels: int64, (N,), or None.
        where: The device.
        training: Its batch size and augmentation are used.
        seed: Seed of the training.
        least: Fewest images in a batch.
        channels_last: Memory format of the batches.
        resident: The same images on the device, of a training beside this one; None puts them there.

    Attributes:
        steps: Batches in an epoch.
        generators: All streams, on the CPU.
        step_generators: Those that a step draws from: of the images that the objective augments, and its own.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64] | None,
        where: torch.device,
        training: TrainingConfig,
        seed: int,
        *,
        least: int,
        channels_last: bool,
        resident: Feed | None = None,
    ) -> None:
        order, drawn, lent, own = (
            torch.Generator().manual_seed(seeding.derive(seed, name))
            for name in ("batches", "augment", "lent", "objective")
        )
        self.generators, self.step_generators = (order, drawn, lent, own), (lent, own)
        self.where, self.channels_last = where, channels_last
        beside = None if resident is None else resident.loader
        self.loader: Loader = Loader(images, labels, where, training.batch_size, order, least=least, beside=beside)
        self._main, self._lent = (
            Augment(self.loader.shape, stream, augment=training.augment, crop_padding=training.crop_padding)
            for stream in (drawn, lent)
        )
        self.steps = self.loader.steps

    def context(self, epochs: int) -> StepContext:
        """Return what an objective is provided with."""
        _, own = self.step_generators
        return StepContext(self.where, own, self._augment_lent, epochs, self.steps)

    def _augment_lent(self, images: Tensor) -> Tensor:
        return to_float(self._lent(images), self.channels_last)

    def __iter__(self) -> Iterator[Batch]:
        """Yield one epoch's batches."""
        for raw, labels, indices in self.loader:
            yield Batch(to_float(self._main(raw), self.channels_last), labels, indices)


@dataclass(frozen=True)
class StackContext(StepContext):
    """What the engine provides to the objectives of several trainings.

    Attributes:
        members: For the objective of each training.
    """

    members: tuple[StepContext, ...] = ()


class StackFeed:
    """The batches of several trainings that make the same steps.

    Args:
        feeds: One for each training, with equal numbers of images.
        shared: All trainings see the same batches: the same images in the same order, equally augmented. A batch is
            then that of the first, (N, C, H, W). Otherwise a batch holds that of each: images (N, n, C, H, W), labels
            and indices (N, n).

    Attributes:
        steps: Batches in an epoch.
        generators: As of a ``Feed``, of all trainings.
        step_generators: Likewise.
    """

    def __init__(self, feeds: Sequence[Feed], *, shared: bool) -> None:
        self.feeds, self.shared = feeds, shared
        self.where, self.steps = feeds[0].where, feeds[0].steps
        self.generators = tuple(stream for feed in feeds for stream in feed.generators)
        self.step_generators = tuple(stream for feed in feeds for stream in feed.step_generators)

    def context(self, epochs: int) -> StackContext:
        """Return what the objectives are provided with."""
        members = tuple(feed.context(epochs) for feed in self.feeds)
        first = members[0]
        return StackContext(first.device, first.generator, first.augment, epochs, self.steps, members)

    def __iter__(self) -> Iterator[Batch]:
        """Yield one epoch's batches."""
        if self.shared:
            yield from self.feeds[0]
            return
        for batches in zip(*self.feeds, strict=True):
            parts = ([batch.images, batch.labels, batch.indices] for batch in batches)
            yield Batch(*(torch.stack(column, 1) for column in zip(*parts, strict=True)))
