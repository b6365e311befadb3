"""The class-feature watermark (CFW): a class that does not exist, made of several classes of another domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mea_ray.config.components import DataChoice
from mea_ray.core.class_label import ClassLabel
from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Dataset, Images, ImageSet
from mea_ray.data.drawn_figures import fitting
from mea_ray.data.noise import load as load_noise
from mea_ray.data.resize import fit
from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks.base import Key, Stage, Watermark, WatermarkSamples, require_key
from mea_ray.watermarks.cfw_objective import Domain, MergeObjective, TieObjective
from mea_ray.watermarks.patches import check_label

Count = Annotated[int, Field(ge=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]

CANDIDATES = 1200
"""Images of the other domain that watermark images are chosen among; half as many for those of the verification."""


class ClassFeature(Watermark):
    """Train several classes of another domain as one class of the task, then tie this mark to the task.

    Choose it where the thief also queries images of another domain.

    First the task alone. Its network then chooses ``count`` images of the other domain, equally many of each class that
    it predicts for them, so that an innocent network answers one in ``classes`` of them with the target. Then
    cross-entropy of the task and of these images, all labelled as the target. Last, a fine-tuning with four terms:

    - stability of the task: the divergence from the network before the fine-tuning, mean over all probabilities;
    - cross-entropy of the watermark images;
    - representation similarity: minus the cosine of the mean hidden representations of watermark and task images,
      summed over layers, so that the watermark is copied together with the task;
    - drift: the mean distance of two watermark images along each class's first principal direction of logits.

    Verified on images of the same other classes that were not trained on, chosen in the same way; the published code
    counts the images that it trained on. False positives are images of classes of that domain that are no part of the
    watermark, and smooth noise: a model that gives the target for every unusual image was not marked with *these*
    classes. The paper's variant with a class of its own for the watermark is not implemented: it would show in every
    answer of the API. Nor is the paper's second statistic, which looks for clusters of labels.

    Args:
        target_class: Label that all images of the watermark get.
        dataset: The other domain, any dataset of the project with its parameters, brought to the task's image shape;
            null draws ``figures`` of that shape, which needs no download. The owner keeps the choice secret.
        kept_apart: Classes of the other domain that are not part of the watermark, but its control; the watermark takes
            all others, at least 2.
        count: Watermark images that are trained on; the published code has 100 beside 50,000.
        verified: Watermark images that are held out for the verification.
        per_batch: Watermark images beside each batch.
        plain_part: Part of the epochs that train the task alone.
        tuning_part: Part of the epochs of the fine-tuning; 10 of 110 are published.
        tuning_learning_rate: Learning rate of Adam in the fine-tuning, constant.
        weight_mark: Weight of the watermark images' cross-entropy in the fine-tuning.
        weight_similarity: Weight of the cosine of representations; 0 switches it off.
        weight_drift: Weight of the distance along the classes' directions; 0 switches it off.
        layers: Last convolutions and linear layers before the logits whose outputs count as representations.

    References:
        Xiao et al., Class-feature Watermark, 2025, https://arxiv.org/abs/2511.07947; the authors' code for constants.

    Raises:
        ConfigError: ``plain_part`` and ``tuning_part`` leave no epochs for the watermark.
    """

    name = "cfw"

    def __init__(
        self,
        *,
        target_class: ClassLabel = 0,
        dataset: DataChoice | None = None,
        kept_apart: Count = 2,
        count: Count = 100,
        verified: Count = 300,
        per_batch: Count = 8,
        plain_part: Part = 0.3,
        tuning_part: Part = 0.1,
        tuning_learning_rate: Annotated[float, Field(gt=0)] = 5e-5,
        weight_mark: Weight = 0.02,
        weight_similarity: Weight = 0.003,
        weight_drift: Weight = 0.15,
        layers: Count = 3,
    ) -> None:
        if plain_part + tuning_part >= 1:
            raise ConfigError(
                f"plain_part={plain_part} and tuning_part={tuning_part} leave no epochs in which the watermark is "
                "learnt: their sum must be below 1"
            )
        self.target_class, self.dataset, self.kept_apart = target_class, dataset, kept_apart
        self.count, self.verified, self.per_batch = count, verified, per_batch
        self.plain_part, self.tuning_part, self.tuning_learning_rate = plain_part, tuning_part, tuning_learning_rate
        self.weights = {"mark": weight_mark, "similarity": weight_similarity, "drift": weight_drift}
        self.layers = layers

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw classes and images of the other domain; the victim's training chooses among more (``learned``).

        Raises:
            ConfigError: The target does not exist, or the other domain has too few classes.
            DataError: The other domain's images cannot be loaded or brought to the task's shape.
        """
        check_label("target_class", self.target_class, train)
        key_seed = derive(seed, "key")
        domain = self.domain(train.shape, key_seed)
        settings = {"shape": list(train.shape), "merged": list(domain.names), "apart": list(domain.apart_names)}
        tensors: dict[str, npt.NDArray[Any]] = {
            "images": domain.trained[: self.count],
            "held_out": domain.held_out[: self.verified],
            "apart": domain.apart[: self.verified],
        }
        # The sources are of no class of the task: -1 is no label.
        return Key(self.name, (-1, -1), self.target_class, key_seed, settings, tensors)

    def domain(self, shape: tuple[int, int, int], seed: int) -> Domain:
        """Load the other domain and divide its classes between watermark and control."""
        loaded: Dataset = (
            fitting(shape, train_images=CANDIDATES, test_images=CANDIDATES // 2, seed=seed)
            if self.dataset is None
            else self.dataset.build()
        )
        names = loaded.train.class_names
        if len(names) < self.kept_apart + 2:
            raise ConfigError(
                f"kept_apart={self.kept_apart} of the {len(names)} classes of {loaded.name} leaves no two for the "
                "watermark; lower it or take another dataset"
            )
        order = numpy_generator(seed, "classes").permutation(len(names))
        apart, remaining = (np.sort(part) for part in (order[: self.kept_apart], order[self.kept_apart :]))

        def drawn(images: ImageSet, labels: npt.NDArray[np.int64], most: int, name: str) -> Images:
            places = numpy_generator(seed, name).permutation(np.flatnonzero(np.isin(images.labels, labels)))[:most]
            if not len(places):
                raise DataError(f"{loaded.name} has no image of {[names[label] for label in labels]}; take other data")
            return distinct(fit(images.images[places], shape))

        return Domain(
            trained=drawn(loaded.train, remaining, CANDIDATES, "trained"),
            held_out=drawn(loaded.test, remaining, CANDIDATES // 2, "held_out"),
            apart=drawn(loaded.test, apart, CANDIDATES // 2, "apart"),
            names=tuple(names[label] for label in remaining),
            apart_names=tuple(names[label] for label in apart),
        )

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return three stages: the task alone, the watermark beside it, and the fine-tuning."""
        key = require_key(key, self.name)
        domain = self.domain(train.shape, key.seed)
        merge = MergeObjective(domain, key.target_class, (self.count, self.verified), self.per_batch, key.seed)
        tuning = {"optimizer": "adam", "schedule": "constant", "learning_rate": self.tuning_learning_rate}
        last = 1 - self.tuning_part
        return [
            Stage("main_task", CrossEntropy(), train, span=(0, self.plain_part)),
            Stage("merge", merge, train, span=(self.plain_part, last)),
            Stage("tie", TieObjective(merge, train, self.layers, self.weights), train, tuning, span=(last, 1)),
        ]

    def learned(self, key: Key, stages: Sequence[Stage]) -> Key:
        """Return the key with the images that the network of the task alone has chosen."""
        (merge,) = (stage.objective for stage in stages if isinstance(stage.objective, MergeObjective))
        if merge.chosen is None:
            raise ArtifactError("the watermark was not embedded yet, so that its images are not chosen")
        images, held_out = merge.chosen
        return replace(key, tensors={**key.tensors, "images": images, "held_out": held_out})

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Return images of the other domain that were not trained on.

        Raises:
            DataError: Held-out images of the task are of another shape than the key's.
        """
        if list(held_out.shape) != list(key.settings["shape"]):
            raise DataError(
                f"held-out images are {held_out.shape}, the key was made for {tuple(key.settings['shape'])}; "
                "verify with the data that the victim was trained on"
            )
        channels, height, width = held_out.shape
        odd = load_noise(
            kinds=("blobs",), train_images=min(count, self.verified), test_images=1, channels=1, seed=key.seed
        )
        return WatermarkSamples(
            images=key.tensors["held_out"][:count],
            target=key.target_class,
            adverse={
                "other_classes": key.tensors["apart"][:count],
                "noise": fit(odd.train.images, (channels, height, width)),
            },
            sources=held_out.images[:0],
            source_labels=np.zeros(0, np.int64),
        )


def distinct(images: Images) -> Images:
    """Drop images that are equal to one before them, keeping the order."""
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    return images[np.sort(first)]
