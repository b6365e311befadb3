"""Judge one model: is it the owner's, and what does carrying (or stealing) the watermark cost it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images, ImageSet, Labels, Recognise
from mea_ray.evaluation import metrics
from mea_ray.results.records import ModelReport
from mea_ray.verification.proportions import binomial_p_value, proportion

PredictLogits = Callable[[Images], npt.NDArray[np.float32]]
"""uint8 images (N, C, H, W) to logits (N, classes)."""


class Samples(Protocol):
    """What verification needs of a watermark's held-out samples; ``watermarks.base.WatermarkSamples`` is one."""

    @property
    def images(self) -> Images:
        """Distinct watermark samples, uint8 (n, C, H, W)."""
        ...

    @property
    def target(self) -> int:
        """Label that counts as success."""
        ...

    @property
    def adverse(self) -> Mapping[str, Images]:
        """For each other geometry, the same classes mixed that way."""
        ...

    @property
    def other_classes(self) -> Images | None:
        """The watermark's mixes, but of classes that the key does not name; None where there are none."""
        ...

    @property
    def sources(self) -> Images:
        """The clean samples that were mixed, uint8 (s, C, H, W)."""
        ...

    @property
    def source_labels(self) -> Labels:
        """Their labels, int64 (s,)."""
        ...


def report(
    predict_logits: PredictLogits,
    test: ImageSet,
    *,
    samples: Samples | None = None,
    victim: Labels | None = None,
    null_rate: float | None = None,
    threshold: float = 0.3,
    significance: float = 0.01,
    knn_accuracy: float | None = None,
    recognise: Recognise | None = None,
    chance: float | None = None,
) -> ModelReport:
    """Measure a model on held-out data and give the verdict.

    Args:
        predict_logits: The model under judgement.
        test: Where accuracy and fidelity are measured.
        samples: Held-out watermark samples; None without a key, and nothing of the watermark is reported.
        victim: The victim's predictions on ``test``, int64 (N,); None leaves the fidelity out.
        null_rate: An innocent model's success rate (``proportions.null_rate``), in [0, 1]; None leaves the p-value out.
        threshold: The paper's verdict: WSR strictly above it infringes.
        significance: The statistical verdict: a p-value at or below it infringes.
        knn_accuracy: Of an encoder, reported as it is.
        recognise: A scheme's own test of what counts as a success; None counts what is classified as the target.
        chance: A scheme's own rate of innocent models, in [0, 1], for a second p-value; it gives no verdict.

    Returns:
        The report. What the carrier costs (``source_accuracy``, ``source_target_probability``, ``calibration_error``)
        is measured on the clean held-out samples of the source classes, as a customer could see it.

    Raises:
        DataError: There are no test images or no watermark samples, or the model gives no logits: another shape,
            numbers that are not finite, or probabilities.
    """
    logits = predict_logits(test.images)
    _check_logits(logits, test)
    predicted = logits.argmax(1).astype(np.int64)
    accuracy = metrics.accuracy(predicted, test.labels)
    fidelity = metrics.fidelity(predicted, victim) if victim is not None else None
    if samples is None:
        return ModelReport(accuracy=accuracy, fidelity=fidelity, knn_accuracy=knn_accuracy)
    if not len(samples.images):
        raise DataError("there are no watermark samples to verify with; raise splits.verification_fraction")

    def successes(images: Images) -> tuple[int, int]:
        said = predict_logits(images).argmax(1) == samples.target if recognise is None else recognise(images)
        return int(said.sum()), len(images)

    hits, trials = successes(samples.images)
    wsr = proportion(hits, trials)
    wfpr = {name: proportion(*successes(images)) for name, images in samples.adverse.items() if len(images)}
    others = samples.other_classes
    p_value = binomial_p_value(hits, trials, null_rate) if null_rate is not None else None
    return ModelReport(
        accuracy=accuracy,
        knn_accuracy=knn_accuracy,
        fidelity=fidelity,
        wsr=wsr,
        wfpr=wfpr,
        wfpr_mean=float(np.mean([rate.rate for rate in wfpr.values()])) if wfpr else None,
        wfpr_classes=proportion(*successes(others)) if others is not None and len(others) else None,
        p_value=p_value,
        p_value_chance=binomial_p_value(hits, trials, chance) if chance is not None else None,
        infringes_threshold=wsr.rate > threshold,
        infringes_significance=p_value <= significance if p_value is not None else None,
        **_carrier_cost(predict_logits, samples, test.class_names),
    )


def _check_logits(logits: npt.NDArray[np.float32], test: ImageSet) -> None:
    """Refuse what cannot be logits: probabilities would be softened once more, and nothing would look wrong."""
    expected = (len(test), test.classes)
    if logits.shape != expected:
        raise DataError(f"the model gives {logits.shape} logits for {len(test)} images of {test.classes} classes")
    if not np.isfinite(logits).all():
        raise DataError("the model gives logits that are not finite numbers")
    if (logits >= 0).all() and np.allclose(logits.sum(1), 1, atol=1e-3):
        raise DataError(
            "the model gives probabilities (every row sums to 1), but logits are expected; leave out its softmax, or "
            "give the logarithms of the probabilities"
        )


def _carrier_cost(predict_logits: PredictLogits, samples: Samples, class_names: tuple[str, ...]) -> dict[str, Any]:
    if not len(samples.sources):
        return {}
    probabilities = softmax(predict_logits(samples.sources).astype(np.float64), axis=1)
    right = probabilities.argmax(1) == samples.source_labels
    return {
        "source_accuracy": {
            class_names[label]: float(right[samples.source_labels == label].mean())
            for label in map(int, np.unique(samples.source_labels))
        },
        "source_target_probability": float(probabilities[:, samples.target].mean()),
        "calibration_error": metrics.calibration_error(probabilities, samples.source_labels),
    }
