from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binomtest

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images, ImageSet
from mea_ray.evaluation import metrics
from mea_ray.results.records import RankRecord
from mea_ray.verification.verify import report

CLASSES, TARGET = 4, 2


def labelled(labels: list[int]) -> Images:
    """Images whose one pixel is the class that ``by_pixel`` gives them."""
    return np.array(labels, np.uint8).reshape(-1, 1, 1, 1)


def by_pixel(images: Images) -> npt.NDArray[np.float32]:
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
    nulls = [{"wsr": 0.1}, {"wsr": 0.31}, {"wsr": 0.0}, {"wsr": 0.2, "lean": 0.0}]
    result = report(by_pixel, TEST, samples=SAMPLES, victim=np.array([0, 1, 2, 3, 1]), nulls=nulls)
    assert result.accuracy == pytest.approx(4 / 5) and result.fidelity == pytest.approx(4 / 5)
    assert result.wsr is not None and (result.wsr.successes, result.wsr.trials) == (31, 100)
    expected = binomtest(31, 100).proportion_ci(0.95, method="wilson")
    assert (result.wsr.low, result.wsr.high) == pytest.approx((expected.low, expected.high))
    assert {name: rate.rate for name, rate in result.wfpr.items()} == {"donut": 0.25, "hotdog": 0.0}
    assert result.wfpr_mean == pytest.approx(0.125)
    assert result.wfpr_classes is not None and (result.wfpr_classes.successes, result.wfpr_classes.trials) == (3, 12)
    assert result.p_value == pytest.approx(2 / 5)  # a tie with one of four null models
    assert result.null_ranks["wsr"] == RankRecord(at_least=1, references=4)
    assert result.null_ranks["lean"].references == 1 and "log_probability" not in result.null_ranks
    assert result.infringes_threshold


def test_the_cost_of_the_carrier_is_measured_on_clean_sources() -> None:
    result = report(by_pixel, TEST, samples=SAMPLES)
    assert result.source_accuracy == {"zero": pytest.approx(2 / 3), "one": 1.0}
    high, low = np.exp(3) / (np.exp(3) + 3), 1 / (np.exp(3) + 3)
    assert result.source_target_probability == pytest.approx((high + 3 * low) / 4)
    probabilities = np.where(by_pixel(SAMPLES.sources) > 0, high, low)
    assert result.calibration_error == pytest.approx(metrics.calibration_error(probabilities, SAMPLES.source_labels))


def test_a_mark_without_source_classes_costs_calibration_on_all_images() -> None:
    nothing = {"sources": SAMPLES.sources[:0], "source_labels": SAMPLES.source_labels[:0]}
    bare = SimpleNamespace(**{**vars(SAMPLES), **nothing})
    result = report(by_pixel, TEST, samples=bare)
    probabilities = np.exp(by_pixel(TEST.images))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert result.source_accuracy == {} and result.source_target_probability is None
    assert result.calibration_error == pytest.approx(metrics.calibration_error(probabilities, TEST.labels))


def test_the_threshold_is_strict_and_says_nothing_of_the_rank() -> None:
    assert report(by_pixel, TEST, samples=SAMPLES, threshold=0.3).infringes_threshold
    assert not report(by_pixel, TEST, samples=SAMPLES, threshold=0.31).infringes_threshold
    beaten = report(by_pixel, TEST, samples=SAMPLES, nulls=[{"wsr": 0.9}])
    assert beaten.infringes_threshold and beaten.p_value == 1.0


def test_the_statistics_are_those_of_their_names() -> None:
    result = report(by_pixel, TEST, samples=SAMPLES)
    high, low = np.log(np.exp(3) / (np.exp(3) + 3)), np.log(1 / (np.exp(3) + 3))
    assert result.statistics == {
        "wsr": 0.31,
        "log_probability": pytest.approx((31 * high + 69 * low) / 100),
        "lean": pytest.approx(low),  # of class 1 no image is called the target, of class 0 one in three
        "lean_labels": 0.0,
    }


def test_the_p_value_is_that_of_the_chosen_statistic() -> None:
    nulls = [{"wsr": 0.9, "lean": -9.0}, {"wsr": 0.8, "lean": -8.0}]
    assert report(by_pixel, TEST, samples=SAMPLES, nulls=nulls, statistic="lean").p_value == pytest.approx(1 / 3)
    assert report(by_pixel, TEST, samples=SAMPLES, nulls=nulls, statistic="wsr").p_value == 1.0
    assert report(by_pixel, TEST, samples=SAMPLES, nulls=nulls, statistic="paired").p_value == 1.0, "there is none"


def test_a_scheme_with_a_test_of_its_own_is_read_by_that_alone() -> None:
    result = report(by_pixel, TEST, samples=SAMPLES, recognise=lambda images: images[:, 0, 0, 0] == 0)
    assert result.wsr is not None and result.wsr.rate == 0.69 and result.statistics == {"wsr": 0.69}


def test_null_models_and_models_without_a_key_have_no_p_value() -> None:
    null = report(by_pixel, TEST, samples=SAMPLES)
    assert null.p_value is None and not null.null_ranks and null.fidelity is None
    plain = report(by_pixel, TEST)
    assert plain.wsr is None and plain.infringes_threshold is None and plain.accuracy == pytest.approx(4 / 5)


def test_no_samples_is_no_proof() -> None:
    empty = SimpleNamespace(**{**vars(SAMPLES), "images": SAMPLES.images[:0]})
    with pytest.raises(DataError, match="verification_fraction"):
        report(by_pixel, TEST, samples=empty)


def test_probabilities_are_not_taken_for_logits() -> None:
    def softened(images: Images) -> npt.NDArray[np.float32]:
        powers = np.exp(by_pixel(images))
        shares: npt.NDArray[np.float32] = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
        return shares

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
def test_what_cannot_be_logits_is_refused(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], words: str) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(DataError, match=words):
        report(lambda images: change(by_pixel(images)), TEST)
