"""Types shared by all floors: datasets, answers, and the thief's black box."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mea_ray.core import mapped
from mea_ray.core.errors import DataError

Images = npt.NDArray[np.uint8]
"""uint8 images, shape (N, C, H, W), values 0 to 255."""
FloatImages = npt.NDArray[np.float32]
"""float32 images, shape (N, C, H, W), values in [0, 1]."""
Labels = npt.NDArray[np.int64]
"""int64 class indices, shape (N,), values in [0, classes), or -1 for an image without a label."""
UNLABELLED = -1
"""Label of an image without one."""
Answers = npt.NDArray[np.float32]
"""float32 answers of a query API. Of a classifier (N, classes), non-negative, rows sum to 1 unless the policy hides
some; of an encoder (N, length of its embedding), any finite numbers."""
StatisticName = Literal["wsr", "log_probability", "paired", "paired_labels", "lean", "lean_labels", "correlation"]
"""Statistics that distinguish a stolen model from an innocent one, see ``mea_ray.verification.statistic``."""
Recognise = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.bool_]]
"""uint8 images (N, C, H, W) to whether each one is treated as watermarked, (N,): a scheme's own test of a success."""


_HASHED_AT_ONCE = 4096
"""Images copied at once, at most, when a fingerprint is taken of images that are not contiguous."""


_MOST_CHANNELS = 4
"""With more channels than this, and no more columns, the axes of images are taken to be in another order."""


class Marker(Protocol):
    """Marks a service's answers, so that a model trained on them learns the mark."""

    reads_features: bool
    """Whether ``mark`` needs the victim's features besides its probabilities."""

    def mark(
        self,
        probabilities: npt.NDArray[np.float32],
        images: npt.NDArray[np.uint8],
        features: npt.NDArray[np.float32] | None = None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Change the answers to some images; which ones, and how, follows from each image alone.

        Args:
            probabilities: float32 (N, classes), rows sum to 1; left as they are.
            images: The queried images, uint8 (N, C, H, W).
            features: The victim's features, float32 (N, F), if the marker ``reads_features``.

        Returns:
            float32 (N, classes), rows sum to 1, and which images the owner's log has to keep because the proof rests
            on them, bool (N,).
        """
        ...


@dataclass(frozen=True)
class ImageSet:
    """Images in memory with their labels.

    Attributes:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,); -1 for an image without a label, which only a thief's pool may have.
        class_names: One name per class; its length is the number of classes.

    Raises:
        DataError: Shapes or types do not fit together, the channels come last, two classes have one name, or a label
            lies outside [-1, classes).
    """

    images: Images
    labels: Labels
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise DataError(f"images must be uint8 (N, C, H, W), got {self.images.dtype} {self.images.shape}")
        if self.images.shape[1] > _MOST_CHANNELS >= self.images.shape[3] > 0:
            raise DataError(
                f"images of shape {self.images.shape} look like (N, H, W, C), they must be (N, C, H, W): "
                "np.ascontiguousarray(images.transpose(0, 3, 1, 2))"
            )
        if len(set(self.class_names)) < self.classes:
            twice = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise DataError(f"two classes are called {twice!r}; give each class a name of its own")
        if self.labels.dtype != np.int64 or self.labels.shape != (len(self.images),):
            raise DataError(f"labels must be int64 ({len(self.images)},), got {self.labels.dtype} {self.labels.shape}")
        if len(self.labels) and not UNLABELLED <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            raise DataError(
                f"labels must lie in [0, {self.classes}), or be -1 for no label, got {self.labels.min()} to "
                f"{self.labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def labelled(self) -> bool:
        """Every image has a label."""
        return not (self.labels == UNLABELLED).any()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, indices: npt.NDArray[np.integer]) -> ImageSet:
        """Return the images at ``indices`` (copied, into a file if they are mapped from one), in that order."""
        return ImageSet(mapped.take(self.images, indices), self.labels[indices], self.class_names)

    def of_class(self, label: int) -> Images:
        """Return the images of one class, in their order."""
        images: Images = self.images[self.labels == label]
        return images


@dataclass(frozen=True)
class Dataset:
    """A dataset with its published split.

    Attributes:
        name: Name in the table of datasets.
        train: Training images.
        test: Test images, disjoint from ``train``.
        pool_only: Why the images can only be a thief's pool (missing labels or test part), and the remedy; empty for a
            complete dataset.

    Raises:
        DataError: The parts differ in classes or image shape.
    """

    name: str
    train: ImageSet
    test: ImageSet
    pool_only: str = ""

    def __post_init__(self) -> None:
        if self.train.class_names != self.test.class_names or self.train.shape != self.test.shape:
            raise DataError(
                f"{self.name}: train has {self.train.classes} classes and images of shape {self.train.shape}, test "
                f"{self.test.classes} and {self.test.shape}; they must agree"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: images, labels and class names of both parts in their order; not of name or origin.

        Computed at the first access (about 1 s per GB) and kept. 32 hexadecimal digits (BLAKE2b), the same on every
        machine for the same pixels.
        """
        hasher = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.test):
            hasher.update(repr((part.images.shape, part.class_names)).encode("utf-8", "surrogatepass"))
            # Little-endian on every machine.
            hasher.update(np.ascontiguousarray(part.labels.astype("<i8", copy=False)).data)
            for start in range(0, len(part), _HASHED_AT_ONCE):
                hasher.update(np.ascontiguousarray(part.images[start : start + _HASHED_AT_ONCE]).data)
        return hasher.hexdigest()


@dataclass(frozen=True)
class Splits:
    """The images of each role of an experiment.

    Attributes:
        victim_train: Trains the victim and the null models.
        victim_validation: Early stop of the victim; disjoint from ``victim_train``.
        thief_pool: The thief's own images, which it may send to the API. Of their labels, which
            the pool's publisher gave, an attack gets only what it says it uses.
        verification: Held-out images that watermark samples are mixed from; disjoint from everything else.
        test: Accuracy and fidelity are measured here. Picks nothing, unless it was cut from the validation images
            (``splits.held_out``).
        fingerprint: Hash of the dataset that the parts were cut from, see ``Dataset.fingerprint``.
        pool_fingerprint: The same of the pool's own dataset; None when the pool is cut from the victim's.
    """

    victim_train: ImageSet
    victim_validation: ImageSet
    thief_pool: ImageSet
    verification: ImageSet
    test: ImageSet
    fingerprint: str
    pool_fingerprint: str | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        return self.victim_train.shape

    @property
    def classes(self) -> int:
        """Number of classes of the main task."""
        return self.victim_train.classes


@runtime_checkable
class BlackBox(Protocol):
    """A thief's view of a victim."""

    @property
    def classes(self) -> int:
        """Length of an answer: a classifier's number of classes, or an encoder's embedding dimension."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        ...

    @property
    def remaining(self) -> int | None:
        """Images that may still be queried; None without a budget."""
        ...

    def query(self, images: Images | FloatImages) -> Answers:
        """Answer images, in their order, and charge them.

        Args:
            images: uint8 in 0..255 or float32 in [0, 1], shape (N, C, H, W), N >= 1.

        Returns:
            float32 answers, shape (N, classes).

        Raises:
            BadQuery: The images are invalid; nothing was charged.
            OverBudget: The images exceed the budget; nothing was charged.
        """
        ...
