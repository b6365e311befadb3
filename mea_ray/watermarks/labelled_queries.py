"""The base of watermarks whose key is a set of labelled images: Adi's, the margin-based one, DAWN."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
from torch import nn

from mea_ray.core.errors import DataError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Images, ImageSet, Labels, Recognise
from mea_ray.evaluation import metrics
from mea_ray.watermarks.base import Key, Watermark, WatermarkSamples

UNSEEN = 1000
"""Most control images, which are not part of the key."""


class LabelledQueries(Watermark):
    """The key holds ``images`` and ``labels``; a success is an image of the key that gets its label.

    The set that was trained on is verified, as in the papers, so that a WSR says nothing about other images. False
    positives are images that were not trained on, with labels that follow from their content.
    """

    control = "unseen"
    """Name of the control images."""

    @abstractmethod
    def unseen(self, key: Key, held_out: ImageSet, count: int, seed: int) -> Images:
        """Return up to ``count`` images like the key's that were not trained on, uint8 (n, C, H, W)."""

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Return the images of the key.

        Raises:
            DataError: Held-out images are of another shape than the key's.
        """
        if list(held_out.shape) != list(key.settings["shape"]):
            raise DataError(
                f"held-out images are {held_out.shape}, the key was made for {tuple(key.settings['shape'])}; "
                "verify with the data that the victim was trained on"
            )
        images = key.tensors["images"]
        return WatermarkSamples(
            images=images[:count],
            target=-1,  # no class: every image has a label of its own
            adverse={self.control: self.unseen(key, held_out, min(count, UNSEEN), seed)},
            sources=images[:0],
            source_labels=np.zeros(0, np.int64),
        )

    def labels_of(self, key: Key) -> dict[bytes, int]:
        """Return the label that counts as success for each image, by its content."""
        pairs = zip(key.tensors["images"], key.tensors["labels"], strict=True)
        return {image.tobytes(): int(label) for image, label in pairs}

    def recogniser(self, key: Key, model: nn.Module) -> Recognise:
        """Return a function that says which images get the label that the key gives them, bool (N,).

        The label of an image that is not the key's follows from its content, so that chance decides.
        """
        known = self.labels_of(key)
        classes = int(key.settings["classes"])

        def wanted(image: Images) -> int:
            content = image.tobytes()
            return known[content] if content in known else derive(key.seed, content.hex()) % classes

        def recognise(images: Images) -> npt.NDArray[np.bool_]:
            labels: Labels = np.array([wanted(image) for image in images], np.int64)
            right: npt.NDArray[np.bool_] = metrics.predictions(model, images) == labels
            return right

        return recognise
