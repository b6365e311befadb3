"""Neural Cleanse: the smallest patch that turns all images into a class. Classes that need far less are flagged."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mea_ray.core.types import Images
from mea_ray.detection.base import Count, Detection, DetectionReport, Positive
from mea_ray.evaluation.triggers import Trigger, TriggerSearch, anomaly, reverse_engineered
from mea_ray.models.base import ImageModel


class NeuralCleanse(Detection):
    """Optimise a mask and a pattern for each class, all classes in one batch, and compare the masks' L1 norms.

    Choose it first: the standard search for a backdoor's target class.

    The loss of class c is the cross-entropy of (1 - m) x + m p with c, plus lambda_c times the L1 norm of m. lambda_c
    is multiplied by ``factor`` after ``patience`` checks in a row at which the trigger succeeded, and divided by
    factor**1.5 after as many at which it failed. The smallest mask that succeeded is reported. A class is flagged if
    its norm lies below the median of all classes by more than ``limit`` scaled median absolute deviations.

    Args:
        steps: Updates of masks and patterns.
        batch_size: Images per update; each gets the triggers of all classes.
        success: Fraction of the images that a trigger must turn into its class to succeed.
        initial_lambda: Initial value of lambda.
        factor: Factor on lambda.
        patience: Checks in a row before lambda changes.
        look_every: Updates between two checks.
        learning_rate: Learning rate of Adam with betas (0.5, 0.9).
        limit: Anomaly index from which a class is flagged; 2 in the paper.

    References:
        Wang et al., Neural Cleanse, S&P 2019, section IV.
    """

    name = "neural_cleanse"

    def __init__(
        self,
        *,
        steps: Count = 600,
        batch_size: Count = 32,
        success: Annotated[float, Field(gt=0, le=1)] = 0.99,
        initial_lambda: Positive = 1e-3,
        factor: Annotated[float, Field(gt=1)] = 1.5,
        patience: Count = 5,
        look_every: Count = 4,
        learning_rate: Positive = 0.1,
        limit: Positive = 2.0,
    ) -> None:
        self.success, self.limit = success, limit
        self.search = TriggerSearch(
            steps=steps,
            batch_size=batch_size,
            success=success,
            initial_lambda=initial_lambda,
            factor=factor,
            patience=patience,
            look_every=look_every,
            learning_rate=learning_rate,
        )

    def inspect(self, model: ImageModel, clean: Images, samples: Images | None, seed: int) -> DetectionReport:
        """Return a trigger and an anomaly index for each class."""
        triggers = self.triggers(model, clean, seed)
        norms = np.array([trigger.norm if trigger.success >= self.success else np.inf for trigger in triggers])
        indices = anomaly(norms)
        numbers = {f"norm/{t.label}": t.norm for t in triggers} | {f"success/{t.label}": t.success for t in triggers}
        numbers |= {f"anomaly/{label}": float(value) for label, value in enumerate(indices)}
        flagged = tuple(int(label) for label in np.flatnonzero(indices > self.limit))
        return DetectionReport(flagged, tuple(triggers), numbers)

    def triggers(self, model: ImageModel, clean: Images, seed: int) -> list[Trigger]:
        """Reverse-engineer a trigger for each class."""
        return reverse_engineered(model, clean, self.search, seed)
