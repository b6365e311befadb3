"""MEA-Defender as the authors' code trains it: two stages, a contrastive term, unpaired divergences, two-task MGDA.

It differs from the code (``attack_cifar.py``, ``secure_train.py``, ``utils/trainer.py``) in these points, none of which
changes the expected composition:

- Normal samples are a class-balanced set, fixed for the stage, with every image of a class equally often, instead of
  draws with replacement. Pools are evenly spaced within each class instead of over the whole set.
- Watermark and evasion samples take the place of random rows of a batch, instead of being fixed numbers of items.
- Gradients are summed over batches (1, 2), (3, 4), ... instead of (1), (2, 3), ...; a last odd batch is an update of
  its own instead of being dropped.
- ``RatioMix`` in the code is the left/right geometry again: here that one is drawn twice as often.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.settings import Settings
from mea_ray.core.types import ImageSet
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mea_defender.two_stage_objective import AuthorsLoss, AuthorsObjective, Composition
from mea_ray.watermarks.mixed_classes import MixedClasses, evenly
from mea_ray.watermarks.mixing import Mixing, SourcePool


class StageSettings(Composition):
    """What one of the two stages trains on, and how long."""

    epochs: int | None = Field(None, ge=1, description="Epochs of the stage; null takes the victim's training section.")
    learning_rate: float = Field(1e-3, gt=0, description="Learning rate of Adam.")


class UpdateSettings(Settings):
    """How both stages update the weights."""

    step_epochs: int = Field(10, ge=1, description="Epochs between two cuts of the learning rate.")
    step_factor: float = Field(0.5, gt=0, description="Factor of each cut.")
    augment: tuple[Literal["flip", "crop"], ...] = Field(("flip",), description="Augmentation of the images.")
    accumulate_steps: int = Field(2, ge=1, description="Batches whose gradients are summed for one update.")


def balanced(train: ImageSet, rate: float, count: int, seed: int) -> ImageSet:
    """Return a class-balanced set in which each image of a class occurs equally often, give or take one.

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

    Choose it to follow the authors' code step by step.

    Defaults are the authors'; their two stages have 100 epochs each. See the module for the differences.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label that the victim gives to a mix.
        mixing: How they are mixed; ``horizontal`` halves and a canvas of the mean colour, as in the authors' code.
        key: Whether the classes are those given, or drawn.
        first: Stage that embeds the watermark.
        second: Stage that rules other mixes out.
        update: How both stages update the weights.
        evasion_pool: Part of the training images that differently mixed samples are mixed from.
        loss: Constants of the loss.

    Raises:
        ConfigError: Classes coincide, or a geometry makes the combiner's own mixes.
    """

    name = "mea_defender_two_stage"
    renamed: ClassVar[Mapping[str, str]] = {
        **MixedClasses.renamed,
        **{
            f"stage{number}_{option}": f"{stage}.{option}"
            for number, stage in ((1, "first"), (2, "second"))
            for option in ("epochs", "learning_rate", "data_rate", "normals", "mixes", "evasion", "fixed_samples")
        },
        **{name: f"update.{name}" for name in ("step_epochs", "step_factor", "augment", "accumulate_steps")},
        "fixed_batch": "loss.fixed_batch",
        "contrastive_weight": "loss.contrastive_weight",
        "contrastive_margin": "loss.contrastive_margin",
        "distill_weight": "loss.distill_weight",
        "distill_pulse": "loss.distill_pulse",
        "distill_period": "loss.distill_period",
        "gradient_normalisation": "loss.normalisation",
    }

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(space="normalised"),
        key: KeyDraw = KeyDraw(),
        first: StageSettings = StageSettings(data_rate=0.5, normals=0.99, mixes=0.01, evasion=0.0, fixed_samples=600),
        second: StageSettings = StageSettings(
            learning_rate=1e-4, data_rate=1.0, normals=0.45, mixes=0.2, evasion=0.08, fixed_samples=1000
        ),
        update: UpdateSettings = UpdateSettings(),
        evasion_pool: Annotated[float, Field(gt=0, le=1)] = 0.008,
        loss: AuthorsLoss = AuthorsLoss(),
    ) -> None:
        super().__init__(source_classes, target_class, mixing, key)
        self.first, self.second, self.update = first, second, update
        self.evasion_pool, self.loss = evasion_pool, loss

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the two stages: ``embed`` and ``secure``."""
        key = require_key(key, self.name)
        return [
            self._stage("embed", key, train, self.first),
            self._stage("secure", key, train, self.second),
        ]

    def _stage(self, name: str, key: Key, train: ImageSet, settings: StageSettings) -> Stage:
        combiner, others = self.combiners(key)
        # The code's "Vertical" and "RatioMix" are one geometry, so that it is drawn twice as often as the others.
        drawn = [c for n, c in others.items() for _ in range(2 if n == "left_right" else 1)]
        objective = AuthorsObjective(
            self._pool(key, train, settings.data_rate),
            self._pool(key, train, self.evasion_pool),
            (*key.source_classes, key.target_class),
            combiner,
            drawn,
            settings,
            self.loss,
        )
        count = max(1, round(settings.total * len(train)))
        overrides: dict[str, Any] = {
            "optimizer": "adam",
            "schedule": "step",
            "learning_rate": settings.learning_rate,
            **{name: getattr(self.update, name) for name in UpdateSettings.model_fields},
        }
        if settings.epochs is not None:
            overrides["epochs"] = settings.epochs
        return Stage(name, objective, balanced(train, settings.data_rate, count, key.seed), overrides)

    @staticmethod
    def _pool(key: Key, train: ImageSet, rate: float) -> SourcePool:
        first, second = (train.of_class(label) for label in key.source_classes)
        used = [evenly(images, max(1, round(rate * len(images)))) for images in (first, second)]
        return SourcePool(*used, augment=True)
