"""MEA-Defender as the authors' code trains it: two stages, a contrastive term, unpaired divergences, two-task MGDA.

Where this differs from the code (``attack_cifar.py``, ``secure_train.py``, ``utils/trainer.py``), all of it of the same
expected composition:

- Normal samples are a class-balanced set, fixed for the stage, with every image of a class equally often, instead of
  draws with replacement. Pools are evenly spaced within each class instead of over the whole set.
- Watermark and evasion samples take the place of random rows of a batch, instead of being fixed numbers of items.
- Gradients are summed over batches (1, 2), (3, 4), ... instead of (1), (2, 3), ...; a last odd batch is an update of
  its own instead of being dropped.
- ``RatioMix`` in the code is the left/right geometry again: here that one is drawn twice as often.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import ImageSet
from mea_ray.watermarks.base import Key, Stage
from mea_ray.watermarks.mea_defender.objective import SourcePool
from mea_ray.watermarks.mea_defender.scheme import combine_options, require_key
from mea_ray.watermarks.mea_defender.two_stage_objective import AuthorsLoss, AuthorsObjective, Composition
from mea_ray.watermarks.mea_defender.weighting import Normalisation
from mea_ray.watermarks.mixed_classes import MixedClasses, evenly


def balanced(train: ImageSet, rate: float, count: int, seed: int) -> ImageSet:
    """A set with as many images of every class, each image of a class equally often (give or take one).

    Args:
        train: Images to take from.
        rate: Part of each class that is used, evenly spaced; at least one image.
        count: Size of the set.
        seed: Seed of the order.
    """
    rng = numpy_generator(seed, "balanced")
    present = np.unique(train.labels)
    chosen = []
    for place, label in enumerate(present):
        members = np.flatnonzero(train.labels == label)
        members = evenly(members, max(1, round(rate * len(members))))
        share = count // len(present) + (place < count % len(present))
        rounds = -(-share // len(members))
        chosen.append(np.concatenate([rng.permutation(members) for _ in range(rounds)] or [members[:0]])[:share])
    return train.take(rng.permutation(np.concatenate(chosen)))


class MeaDefenderTwoStage(MixedClasses):
    """The two-stage procedure of the authors' code: watermark first, then training that rules other mixes out.

    Defaults are the authors'; their two stages have 100 epochs each. See the module for where this differs.

    Args:
        source_classes: Labels of the two classes that are combined.
        target_class: Label that the victim gives to the combination.
        combiner: How a watermark sample is mixed; a name in the table of combiners.
        orientation: crop_paste: direction of the cut; ``horizontal`` is top / bottom, as in the authors' code.
        jitter: crop_paste and the halves: largest shift of the cut, in pixels of a 32-pixel image.
        alpha: autoencoder, pixel_merge: share of the first image.
        combiner_options: Further options of the combiner, by name.
        adverse_geometries: The other mixes of stage 2 and of WFPR; null takes the authors'.
        mix_space: Empty canvas is black (``pixel``) or of the mean colour (``normalised``, the authors' code).
        stage1_epochs: Epochs of the first stage; null takes the victim's training section.
        stage2_epochs: Of the second.
        stage1_learning_rate: Of Adam.
        stage2_learning_rate: Of Adam.
        step_epochs: Epochs between two cuts of the learning rate.
        step_factor: What it is multiplied by.
        augment: Augmentation in both stages.
        accumulate_steps: Batches whose gradients are summed for one update.
        stage1_data_rate: Part of the training images that the first stage uses.
        stage1_normals: Normal samples in an epoch, as a part of the training set's size.
        stage1_mixes: Watermark samples.
        stage1_fixed_samples: Fixed samples of each source class and of the mixes for the divergences.
        stage2_data_rate: Part of the training images that the second stage uses.
        stage2_normals: Normal samples in an epoch, as a part of the training set's size.
        stage2_mixes: Watermark samples.
        stage2_evasion: Differently mixed samples, all geometries and both labels together.
        stage2_fixed_samples: Fixed samples for the divergences.
        evasion_pool: Part of the training images that differently mixed samples are mixed from.
        fixed_batch: Fixed samples in a step; null takes all (the authors' code, and most of its time).
        contrastive_weight: Factor of the contrastive term.
        contrastive_margin: Distance of the logits from which unlike pairs are left alone.
        distill_weight: Factor k of the divergences.
        distill_pulse: k in every ``distill_period``-th epoch.
        distill_period: Epochs from one such epoch to the next.
        gradient_normalisation: What MGDA divides a gradient by.
    """

    name = "mea_defender_two_stage"

    def __init__(
        self,
        *,
        source_classes: tuple[int, int] = (0, 1),
        target_class: int = 2,
        combiner: str = "crop_paste",
        orientation: Literal["horizontal", "vertical", "random"] = "horizontal",
        jitter: int = 3,
        alpha: float = 0.5,
        combiner_options: dict[str, Any] | None = None,
        adverse_geometries: tuple[str, ...] | None = None,
        mix_space: Literal["pixel", "normalised"] = "normalised",
        stage1_epochs: int | None = None,
        stage2_epochs: int | None = None,
        stage1_learning_rate: float = 1e-3,
        stage2_learning_rate: float = 1e-4,
        step_epochs: int = 10,
        step_factor: float = 0.5,
        augment: tuple[Literal["flip", "crop"], ...] = ("flip",),
        accumulate_steps: int = 2,
        stage1_data_rate: float = 0.5,
        stage1_normals: float = 0.99,
        stage1_mixes: float = 0.01,
        stage1_fixed_samples: int = 600,
        stage2_data_rate: float = 1.0,
        stage2_normals: float = 0.45,
        stage2_mixes: float = 0.2,
        stage2_evasion: float = 0.08,
        stage2_fixed_samples: int = 1000,
        evasion_pool: float = 0.008,
        fixed_batch: int | None = None,
        contrastive_weight: float = 1.0,
        contrastive_margin: float = 1.0,
        distill_weight: float = 2.0,
        distill_pulse: float = 12.0,
        distill_period: int = 10,
        gradient_normalisation: Normalisation = "loss+",
    ) -> None:
        shared = {"orientation": orientation, "jitter": jitter, "alpha": alpha}
        options = combine_options(combiner, combiner_options, **shared)
        super().__init__(source_classes, target_class, combiner, options, adverse_geometries, mix_space, jitter)
        self.first = Composition(stage1_data_rate, stage1_normals, stage1_mixes, 0.0, stage1_fixed_samples)
        self.second = Composition(stage2_data_rate, stage2_normals, stage2_mixes, stage2_evasion, stage2_fixed_samples)
        self.evasion_pool = evasion_pool
        self._check_parts()
        self.loss = AuthorsLoss(
            contrastive_weight,
            contrastive_margin,
            distill_weight,
            distill_pulse,
            distill_period,
            fixed_batch,
            gradient_normalisation,
        )
        positive: dict[str, float | None] = {
            "stage1_epochs": stage1_epochs,
            "stage2_epochs": stage2_epochs,
            "stage1_learning_rate": stage1_learning_rate,
            "stage2_learning_rate": stage2_learning_rate,
            "step_epochs": step_epochs,
            "step_factor": step_factor,
            "accumulate_steps": accumulate_steps,
            "fixed_batch": fixed_batch,
            "distill_period": distill_period,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be greater than 0")
        for name in ("contrastive_weight", "contrastive_margin", "distill_weight", "distill_pulse"):
            if not 0 <= getattr(self.loss, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self.loss, name)} must be finite and at least 0")
        shared_overrides = {
            "optimizer": "adam",
            "schedule": "step",
            "step_epochs": step_epochs,
            "step_factor": step_factor,
            "augment": tuple(augment),
            "accumulate_steps": accumulate_steps,
        }
        self.overrides = [
            {**shared_overrides, "learning_rate": rate, **({} if epochs is None else {"epochs": epochs})}
            for rate, epochs in ((stage1_learning_rate, stage1_epochs), (stage2_learning_rate, stage2_epochs))
        ]

    def _check_parts(self) -> None:
        for stage, composition in (("stage1", self.first), ("stage2", self.second)):
            if not 0 < composition.data_rate <= 1:
                raise ConfigError(f"{stage}_data_rate={composition.data_rate} must lie in (0, 1]")
            if not composition.normals > 0:
                raise ConfigError(f"{stage}_normals={composition.normals} must be greater than 0")
            if not (composition.mixes >= 0 and composition.evasion >= 0):
                raise ConfigError(f"{stage}_mixes and {stage}_evasion must be at least 0, got {composition}")
            if composition.fixed_samples < 1:
                raise ConfigError(f"{stage}_fixed_samples={composition.fixed_samples} must be at least 1")
        if not 0 < self.evasion_pool <= 1:
            raise ConfigError(f"evasion_pool={self.evasion_pool} must lie in (0, 1]")

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the two stages: ``embed`` and ``secure``."""
        key = require_key(key, self.name)
        return [
            self._stage("embed", key, train, self.first, self.overrides[0]),
            self._stage("secure", key, train, self.second, self.overrides[1]),
        ]

    def _stage(
        self, name: str, key: Key, train: ImageSet, composition: Composition, overrides: Mapping[str, Any]
    ) -> Stage:
        combiner, others = self.combiners(key)
        # The code's "Vertical" and "RatioMix" are one geometry, so that it is drawn twice as often as the others.
        drawn = [c for n, c in others.items() for _ in range(2 if n == "left_right" else 1)]
        objective = AuthorsObjective(
            self._pool(key, train, composition.data_rate),
            self._pool(key, train, self.evasion_pool),
            (*key.source_classes, key.target_class),
            combiner,
            drawn,
            composition,
            self.loss,
        )
        count = max(1, round(composition.total * len(train)))
        return Stage(name, objective, balanced(train, composition.data_rate, count, key.seed), overrides)

    @staticmethod
    def _pool(key: Key, train: ImageSet, rate: float) -> SourcePool:
        first, second = (train.of_class(label) for label in key.source_classes)
        kept = [evenly(images, max(1, round(rate * len(images)))) for images in (first, second)]
        return SourcePool(*kept, augment=True)
