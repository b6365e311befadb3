"""Watermark samples among queries: what a thief who sells the stolen model can do against being tested."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Images
from mea_ray.detection.base import Detection, Evidence
from mea_ray.evaluation import metrics
from mea_ray.evaluation.local_outlier_factor import check_outliers, fit_outliers, outside
from mea_ray.models.base import ImageModel

Scores = npt.NDArray[np.float64]


class LocalOutliers(Detection):
    """Local outlier factor of a query's features among those of clean images.

    Numbers: ``false_positive``, part of clean images that are flagged (those that nothing was fitted on), and
    ``detected``, part of the watermark samples that are. The paper leaves neighbours, threshold and features open.

    Args:
        neighbours: Nearest neighbours that a density is estimated from.
        contamination: Part of the images fitted on that lies outside, in (0, 0.5]; null is scikit-learn's ``auto``.
        fitted: Clean images that it is fitted on, at most; half of what there is, at most.

    References:
        Breunig et al., LOF, SIGMOD 2000; Lv et al., MEA-Defender, 2024, table IX.

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "lof"
    least_images = 4  # two to fit on, two to judge

    def __init__(self, *, neighbours: int = 20, contamination: float | None = None, fitted: int = 5000) -> None:
        check_outliers(neighbours, contamination, fitted)
        self.neighbours, self.contamination, self.fitted = neighbours, contamination, fitted

    def inspect(self, model: ImageModel, clean: Images, asked: Images | None, seed: int) -> Evidence:
        """Return how many clean images and watermark samples are flagged."""
        fit_on, others = halves(clean, self.fitted, seed)
        judge = fit_outliers(metrics.features(model, fit_on), self.neighbours, self.contamination)

        def flagged(images: Images) -> float:
            return float(outside(judge, metrics.features(model, images)).mean())

        numbers = {"false_positive": flagged(others)}
        if asked is not None and len(asked):
            numbers["detected"] = flagged(asked)
        return Evidence(numbers=numbers)


class Strip(Detection):
    """Entropy of the answers to a query blended with clean images: a trigger's answer survives the blending.

    A query is flagged if its mean entropy lies below that of all but ``false_positive`` of clean images.

    Args:
        blends: Clean images that each query is blended with.
        weight: Weight of the query in a blend, in (0, 1).
        false_positive: Part of clean images that may be flagged, in (0, 1).
        images: Queries that are looked at, at most.

    References:
        Gao et al., STRIP, ACSAC 2019, https://arxiv.org/abs/1902.06531.

    Raises:
        ConfigError: A value is out of its range.
    """

    name = "strip"
    least_images = 4  # two to blend with, one for the limit, one to judge

    def __init__(
        self, *, blends: int = 32, weight: float = 0.5, false_positive: float = 0.01, images: int = 500
    ) -> None:
        if blends < 1 or images < 1:
            raise ConfigError(f"blends={blends} and images={images} must be at least 1")
        for name, share in {"weight": weight, "false_positive": false_positive}.items():
            if not 0 < share < 1:
                raise ConfigError(f"{name}={share} must lie strictly between 0 and 1")
        self.blends, self.weight, self.false_positive, self.images = blends, weight, false_positive, images

    def inspect(self, model: ImageModel, clean: Images, asked: Images | None, seed: int) -> Evidence:
        """Return how many clean images and watermark samples are flagged, and the area under the ROC curve."""
        from sklearn.metrics import roc_auc_score

        blended_with, others = halves(clean, len(clean), seed)
        fit_on, judged = halves(others, self.images, seed + 1)
        limit = np.quantile(self.entropies(model, fit_on, blended_with, seed), self.false_positive)
        of_clean = self.entropies(model, judged[: self.images], blended_with, seed)
        numbers = {"false_positive": float((of_clean < limit).mean())}
        if asked is not None and len(asked):
            of_asked = self.entropies(model, asked[: self.images], blended_with, seed)
            numbers["detected"] = float((of_asked < limit).mean())
            truth = np.repeat([0, 1], [len(of_clean), len(of_asked)])
            numbers["auc"] = float(roc_auc_score(truth, -np.concatenate([of_clean, of_asked])))
        return Evidence(numbers=numbers)

    def entropies(self, model: ImageModel, queries: Images, clean: Images, seed: int) -> Scores:
        """Return the mean entropy (nats) of the answers to each query's blends: float64 (N,)."""
        chosen = clean[numpy_generator(seed, "blends").integers(len(clean), size=self.blends)].astype(np.float32)
        entropies = []
        for query in queries.astype(np.float32):
            blends = (self.weight * query + (1 - self.weight) * chosen).round().astype(np.uint8)
            said = metrics.probabilities(model, blends).astype(np.float64)
            entropies.append(float(-(said * np.log(np.maximum(said, 1e-12))).sum(1).mean()))
        return np.array(entropies)


def halves(images: Images, most: int, seed: int) -> tuple[Images, Images]:
    """Draw two disjoint parts: at most ``most`` and at most half of the images, and the rest.

    Raises:
        ConfigError: There are fewer than two images.
    """
    if len(images) < 2:
        raise ConfigError(f"a detection needs two clean images to compare, got {len(images)}; raise detection.images")
    order = numpy_generator(seed, "halves").permutation(len(images))
    cut = min(most, len(images) // 2)
    return images[order[:cut]], images[order[cut:]]
