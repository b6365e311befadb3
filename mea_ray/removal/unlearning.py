"""Unlearning of a trigger that Neural Cleanse reverse-engineered: images with it are trained with their own label."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import ImageSet
from mea_ray.evaluation.triggers import Trigger, TriggerSearch, anomaly, reverse_engineered
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Epochs, LearningRate, Prospect, Removal, Share, ThiefData, copied, labelled, tune


class Unlearning(Removal):
    """Reverse-engineer the smallest trigger of any class, and tune on images under it with their own class.

    Choose it for a thief who looks for a backdoor first, and unlearns what it finds.

    The class whose trigger is the smallest by Neural Cleanse's anomaly index is unlearnt, whether or not the index says
    that it stands out: the thief has nothing to lose. Where no trigger works, clean images alone are tuned on.

    Args:
        share: Share of the images that carries the trigger; 0.2 in the paper.
        steps: Updates of masks and patterns; 600 as in the detection `neural_cleanse`.
        epochs: Passes over the images; 1 in the paper.
        learning_rate: Peak learning rate.

    References:
        Wang et al., Neural Cleanse, S&P 2019, section VI-C (patching by unlearning).
    """

    name = "unlearning"

    def __init__(
        self,
        *,
        share: Share = 0.2,
        steps: Annotated[int, Field(ge=1)] = 600,
        epochs: Epochs = 1,
        learning_rate: LearningRate = 5e-4,
    ) -> None:
        self.share, self.steps, self.epochs, self.learning_rate = share, steps, epochs, learning_rate

    @property
    def strength(self) -> float:
        """Share of the images that carries the trigger."""
        return self.share

    def check(self, prospect: Prospect) -> None:
        """Refuse batches of one image."""
        prospect.check_batches(prospect.images)

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the tuned copy."""
        search = TriggerSearch(steps=self.steps)
        trigger = smallest(reverse_engineered(model, thief.images, search, derive(seed, "triggers")), search.success)
        clean = labelled(thief, model.classes)
        if trigger is not None:
            clean = patched(clean, trigger, self.share, derive(seed, "patched"))
        return tune(copied(model), clean, thief, seed, epochs=self.epochs, learning_rate=self.learning_rate)


def smallest(triggers: list[Trigger], success: float) -> Trigger | None:
    """Return the trigger that lies farthest below the others' norms, the smallest of equals; None where none works."""
    norms = np.array([trigger.norm if trigger.success >= success else np.inf for trigger in triggers])
    if not np.isfinite(norms).any():
        return None
    return triggers[int(np.lexsort((norms, -anomaly(norms)))[0])]


def patched(clean: ImageSet, trigger: Trigger, share: float, seed: int) -> ImageSet:
    """Put the trigger on a share of the images of other classes; all keep their labels."""
    others = np.flatnonzero(clean.labels != trigger.label)
    chosen = numpy_generator(seed, "chosen").permutation(others)[: round(share * len(clean))]
    images = clean.images.copy()
    images[chosen] = trigger.on(images[chosen])
    return ImageSet(images, clean.labels, clean.class_names)
