from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images, ImageSet
from mea_ray.evaluation import metrics
from mea_ray.verification.verify import report

CLASSES, TARGET = 4, 2


def labelled(labels: list[int]) -> Images:
    """Images whose one pixel is the class that ``by_pixel`` gives them."""
    return np.array(labels, np.uint8).reshape(-1, 1, 1, 1)


def by_pixel(images: Images) -> np.ndarray:
    return np.where(np.eye(CLASSES)[images[:, 0, 0, 0]] > 0, 3.0, 0.0).astype(np.float32)


TEST = ImageSet(labelled([0, 1, 2, 3, 0]), np.array([0, 1, 2, 0, 0]), ("zero", "one", "two", "three"))
SAMPLES = SimpleNamespace(
    images=labelled([2] * 31 + [0] * 69),
    target=TARGET,
    adverse={"donut": labelled([2] * 5 + [1] * 15), "hotdog": labelled([1] * 10)},
    other_classes=labelled([2] * 3 + [3] * 9),
    sources=labelled([0, 0, 2, 1]),
    source_labels=np.array([0, 0, 0, 1]),
)


def test_everything_is_counted() -> None:
    found = report(by_pixel, TEST, samples=SAMPLES, victim=np.array([0, 1, 2, 3, 1]), null_rate=0.1)
    assert found.accuracy == pytest.approx(4 / 5) and found.fidelity == pytest.approx(4 / 5)
    assert found.wsr is not None and (found.wsr.successes, found.wsr.trials) == (31, 100)
    expected = binomtest(31, 100).proportion_ci(0.95, method="wilson")
    assert (found.wsr.low, found.wsr.high) == pytest.approx((expected.low, expected.high))
    assert {name: rate.rate for name, rate in found.wfpr.items()} == {"donut": 0.25, "hotdog": 0.0}
    assert found.wfpr_mean == pytest.approx(0.125)
    assert found.wfpr_classes is not None and (found.wfpr_classes.successes, found.wfpr_classes.trials) == (3, 12)
    assert found.p_value == pytest.approx(binomtest(31, 100, 0.1, alternative="greater").pvalue)
    assert found.infringes_threshold and found.infringes_significance


def test_the_cost_of_the_carrier_is_measured_on_clean_sources() -> None:
    found = report(by_pixel, TEST, samples=SAMPLES)
    assert found.source_accuracy == {"zero": pytest.approx(2 / 3), "one": 1.0}
    high, low = np.exp(3) / (np.exp(3) + 3), 1 / (np.exp(3) + 3)
    assert found.source_target_probability == pytest.approx((high + 3 * low) / 4)
    probabilities = np.where(by_pixel(SAMPLES.sources) > 0, high, low)
    assert found.calibration_error == pytest.approx(metrics.calibration_error(probabilities, SAMPLES.source_labels))


@pytest.mark.parametrize(
    ("threshold", "significance", "null_rate", "verdicts"),
    [
        (0.3, 0.01, 0.1, (True, True)),
        (0.31, 0.01, 0.1, (False, True)),  # strictly above the threshold
        (0.3, 0.01, 0.3, (True, False)),
        (0.5, 0.5, 0.3, (False, True)),
    ],
)
def test_the_two_verdicts_are_independent(
    threshold: float, significance: float, null_rate: float, verdicts: tuple[bool, bool]
) -> None:
    found = report(by_pixel, TEST, samples=SAMPLES, null_rate=null_rate, threshold=threshold, significance=significance)
    assert (found.infringes_threshold, found.infringes_significance) == verdicts


def test_null_models_and_models_without_a_key_get_no_verdict() -> None:
    null = report(by_pixel, TEST, samples=SAMPLES)
    assert null.p_value is None and null.infringes_significance is None and null.fidelity is None
    plain = report(by_pixel, TEST)
    assert plain.wsr is None and plain.infringes_threshold is None and plain.accuracy == pytest.approx(4 / 5)


def test_no_samples_is_no_proof() -> None:
    empty = SimpleNamespace(**{**vars(SAMPLES), "images": SAMPLES.images[:0]})
    with pytest.raises(DataError, match="verification_fraction"):
        report(by_pixel, TEST, samples=empty)


def test_probabilities_are_not_taken_for_logits() -> None:
    def softened(images: Images) -> np.ndarray:
        powers = np.exp(by_pixel(images))
        return (powers / powers.sum(1, keepdims=True)).astype(np.float32)

    with pytest.raises(DataError, match="softmax"):
        report(softened, TEST, samples=SAMPLES)
    logarithms = report(lambda images: np.log(softened(images)), TEST, samples=SAMPLES)
    assert logarithms.source_target_probability == pytest.approx(
        report(by_pixel, TEST, samples=SAMPLES).source_target_probability
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits: logits[:, :3], "classes"),
        (lambda logits: logits[:-1], "images"),
        (lambda x: x * np.inf, "finite"),
    ],
)
def test_what_cannot_be_logits_is_refused(change: Callable[[np.ndarray], np.ndarray], words: str) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(DataError, match=words):
        report(lambda images: change(by_pixel(images)), TEST)
