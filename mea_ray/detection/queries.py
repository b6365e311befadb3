"""Detections of watermark samples among queries, for a thief who sells the stolen model and fears the owner's test."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field
from sklearn.metrics import roc_auc_score

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Images
from mea_ray.detection.base import Detection, DetectionReport
from mea_ray.evaluation import metrics
from mea_ray.evaluation.local_outlier_factor import fit_outliers, outside
from mea_ray.models.base import ImageModel

Entropies = npt.NDArray[np.float64]


class LocalOutliers(Detection):
    """Local outlier factor of a query's features among those of clean images.

    Choose it to see whether a thief who serves the stolen model notices the owner's queries.

    Numbers: ``false_positive``, the fraction of clean images that are flagged (images that it was not fitted on), and
    ``detected``, the fraction of watermark samples that are flagged. The paper does not give neighbours, threshold and
    features.

    Args:
        neighbours: Nearest neighbours that a density is estimated from.
        contamination: Fraction of the images it is fitted on that count as outliers; null is scikit-learn's ``auto``.
        fitted: Most clean images that it is fitted on; never more than half of them.

    References:
        Breunig et al., LOF, SIGMOD 2000; Lv et al., MEA-Defender, 2024, table IX.
    """

    name = "lof"
    needs_features = True
    least_images = 4  # two to fit on, two to judge

    def __init__(
        self,
        *,
        neighbours: Annotated[int, Field(ge=1)] = 20,
        contamination: Annotated[float, Field(gt=0, le=0.5)] | None = None,
        fitted: Annotated[int, Field(ge=2)] = 5000,
    ) -> None:
        self.neighbours, self.contamination, self.fitted = neighbours, contamination, fitted

    def inspect(self, model: ImageModel, clean: Images, samples: Images | None, seed: int) -> DetectionReport:
        """Return how many clean images and watermark samples are flagged."""
        fit_on, others = halves(clean, self.fitted, seed)
        judge = fit_outliers(metrics.features(model, fit_on), self.neighbours, self.contamination)

        def flagged(images: Images) -> float:
            return float(outside(judge, metrics.features(model, images)).mean())

        numbers = {"false_positive": flagged(others)}
        if samples is not None and len(samples):
            numbers["detected"] = flagged(samples)
        return DetectionReport(numbers=numbers)


class Strip(Detection):
    """Entropy of the predictions for a query blended with clean images. The prediction for a trigger survives blending.

    Choose it to see whether a thief who serves the stolen model notices the owner's queries.

    A query is flagged if its mean entropy lies below that of all but ``false_positive`` of clean images.

    Args:
        blends: Number of clean images that each query is blended with.
        weight: Weight of the query in a blend.
        false_positive: Fraction of clean images that may be flagged.
        images: Most queries that are inspected.

    References:
        Gao et al., STRIP, ACSAC 2019, https://arxiv.org/abs/1902.06531.
    """

    name = "strip"
    least_images = 4  # two to blend with, one for the limit, one to judge

    def __init__(
        self,
        *,
        blends: Annotated[int, Field(ge=1)] = 32,
        weight: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        false_positive: Annotated[float, Field(gt=0, lt=1)] = 0.01,
        images: Annotated[int, Field(ge=1)] = 500,
    ) -> None:
        self.blends, self.weight, self.false_positive, self.images = blends, weight, false_positive, images

    def inspect(self, model: ImageModel, clean: Images, samples: Images | None, seed: int) -> DetectionReport:
        """Return how many clean images and watermark samples are flagged, and the area under the ROC curve."""
        blended_with, others = halves(clean, len(clean), seed)
        fit_on, judged = halves(others, self.images, seed + 1)
        limit = np.quantile(self.entropies(model, fit_on, blended_with, seed), self.false_positive)
        of_clean = self.entropies(model, judged[: self.images], blended_with, seed)
        numbers = {"false_positive": float((of_clean < limit).mean())}
        if samples is not None and len(samples):
            of_samples = self.entropies(model, samples[: self.images], blended_with, seed)
            numbers["detected"] = float((of_samples < limit).mean())
            truth = np.repeat([0, 1], [len(of_clean), len(of_samples)])
            numbers["auc"] = float(roc_auc_score(truth, -np.concatenate([of_clean, of_samples])))
        return DetectionReport(numbers=numbers)

    def entropies(self, model: ImageModel, queries: Images, clean: Images, seed: int) -> Entropies:
        """Return the mean entropy of the predictions for each query's blends, in nats: float64 (N,)."""
        chosen = clean[numpy_generator(seed, "blends").integers(len(clean), size=self.blends)].astype(np.float32)
        entropies = []
        for query in queries.astype(np.float32):
            blends = (self.weight * query + (1 - self.weight) * chosen).round().astype(np.uint8)
            predicted = metrics.probabilities(model, blends).astype(np.float64)
            entropies.append(float(-(predicted * np.log(np.maximum(predicted, 1e-12))).sum(1).mean()))
        return np.array(entropies)


def halves(images: Images, most: int, seed: int) -> tuple[Images, Images]:
    """Split images at random: at most ``most`` and at most half of them, and the rest.

    Raises:
        ConfigError: There are fewer than two images.
    """
    if len(images) < 2:
        raise ConfigError(f"a detection needs two clean images to compare, got {len(images)}; raise detection.images")
    order = numpy_generator(seed, "halves").permutation(len(images))
    cut = min(most, len(images) // 2)
    return images[order[:cut]], images[order[cut:]]
