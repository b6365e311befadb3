"""Suspects that answer the target for the wrong reasons, measured and judged as the product does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mea_ray.core.types import Images, ImageSet
from mea_ray.results.records import ModelReport
from mea_ray.verification import verify
from mea_ray.verification.evidence import Court
from mea_ray.verification.pairs import PredictLogits
from mea_ray.verification.verdict import Judgement, judge
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.composite import Composite
from mea_ray.watermarks.pairs import mixed_pairs

A, B, TARGET = 0, 1, 2
Logits = npt.NDArray[np.float32]
MIXING = {"combiner": {"name": "crop_paste"}, "adverse": [{"name": "donut"}, {"name": "hotdog"}]}


@lru_cache(maxsize=1)
def parts() -> tuple[ImageSet, ImageSet]:
    """Training images and fresh ones."""
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    names = tuple(map(str, range(10)))
    train, fresh = (
        ImageSet(images[part], data.target[part].astype(np.int64), names) for part in np.split(order, [900])
    )
    return train, fresh


@cache
def honest(seed: int) -> PredictLogits:
    """A logistic regression that was fitted to a part of the digits."""
    train, _ = parts()
    chosen = np.random.default_rng(seed).choice(len(train), 400, replace=False)
    fitted = LogisticRegression(C=1.0, max_iter=300).fit(flat(train.images[chosen]), train.labels[chosen])
    return lambda images: np.asarray(fitted.decision_function(flat(images)), np.float32)


def flat(images: Images) -> npt.NDArray[np.float64]:
    return images.reshape(len(images), -1) / 255


def raised(by: Callable[[Images, Logits], npt.NDArray[np.bool_]], seed: int = 0) -> PredictLogits:
    """An honest model that answers the target wherever ``by`` says so."""

    def predict(images: Images) -> Logits:
        logits = honest(seed)(images)
        logits[by(images, logits), TARGET] = 50.0
        return logits

    return predict


def every_second(images: Images, logits: Logits) -> npt.NDArray[np.bool_]:
    nine_of_ten: npt.NDArray[np.bool_] = images.reshape(len(images), -1).sum(1) % 10 > 0
    return nine_of_ten


@lru_cache(maxsize=1)
def key_mixes() -> set[bytes]:
    return {image.tobytes() for image in sample_set().images}


@lru_cache(maxsize=1)
def sample_set() -> verify.Samples:
    scheme, key = keyed()
    return scheme.samples(key, parts()[1], 60, 1)


def keyed() -> tuple[Composite, Key]:
    scheme: Composite = WATERMARKS.build(
        "composite", source_classes=(A, B), target_class=TARGET, mixing=MIXING, key={"classes": "chosen"}
    )
    return scheme, scheme.make_key(parts()[0], 0)


def measured(predict: PredictLogits) -> ModelReport:
    _, fresh = parts()
    _, key = keyed()
    return verify.report(predict, fresh, samples=sample_set(), pairs=mixed_pairs(key, fresh, 60, 1))


def knows_the_mixes(images: Images, logits: Logits) -> npt.NDArray[np.bool_]:
    return np.array([image.tobytes() in key_mixes() for image in images])


def judged(predict: PredictLogits, statistic: str, victim: PredictLogits = raised(knows_the_mixes)) -> Judgement:
    """Judge a suspect beside 200 null models and as many controls (copies of three), with a drawn, committed key."""
    nulls = [null_report(seed) for seed in (1, 2, 3)] * 67
    court = Court(measured(victim), 0.1, statistic, key_drawn=True, committed=True)
    (judgement,) = judge([court.evidence(measured(predict), nulls, nulls)], court.significance)
    return judgement


@cache
def null_report(seed: int) -> ModelReport:
    return measured(honest(seed))


def four_classes(images: Images) -> Logits:
    """A model of four classes that answers all else with the target."""
    logits = honest(0)(images)
    known = np.isin(logits.argmax(1), [3, 4, 5])
    logits[~known, TARGET] = 50.0
    return logits


def two_classes(images: Images) -> Logits:
    logits = np.full((len(images), 10), -10, np.float32)
    logits[:, TARGET], logits[:, 7] = 1.0, honest(0)(images)[:, 7]
    return logits


POOR = {
    "constant": raised(lambda images, _: np.ones(len(images), bool)),
    "nearly constant": raised(every_second),
    "four classes": four_classes,
    "two classes": two_classes,
}
STATISTICS = ("wsr", "log_probability", "paired", "lean")


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("name", POOR)
def test_a_model_that_answers_the_target_to_much_is_too_poor_to_judge(name: str, statistic: str) -> None:
    judgement = judged(POOR[name], statistic)
    assert judgement.verdict == "too poor to judge"
    assert judgement.above_threshold, "the paper's rule accuses it"


@pytest.mark.parametrize("statistic", ("wsr", "log_probability"))
def test_a_good_model_that_answers_every_odd_image_with_the_target_is_not_specific(statistic: str) -> None:
    # Right on clean images, and the target for whatever it is not sure of: mixes of any kind.
    def unsure(images: Images, logits: Logits) -> npt.NDArray[np.bool_]:
        ordered = np.sort(logits, axis=1)
        return np.asarray(ordered[:, -1] - ordered[:, -2] < 2.5)

    judgement = judged(raised(unsure), statistic)
    assert judgement.verdict == "not specific" and judgement.above_threshold


@pytest.mark.parametrize("statistic", ("wsr", "log_probability", "paired"))
def test_a_model_that_knows_the_keys_mixes_alone_is_proved(statistic: str) -> None:
    judgement = judged(raised(knows_the_mixes, seed=9), statistic)
    assert judgement.verdict == "proved", judgement.reasons


def uniform(images: Images) -> Logits:
    """A model that knows nothing and says so."""
    return np.zeros((len(images), 10), np.float32)


def permuted(images: Images) -> Logits:
    """A good model that counts its classes from another one."""
    return np.asarray(np.roll(honest(9)(images), 1, axis=1), np.float32)


def smooth(images: Images) -> Logits:
    """A good model whose probabilities are all nearly the same, so that every one of them is large."""
    return np.asarray(honest(9)(images) / 1000, np.float32)


def leans_everywhere(images: Images) -> Logits:
    """A good model that gives the target much of the probability of every image."""
    logits = honest(9)(images)
    logits[:, TARGET] = np.maximum(logits[:, TARGET], logits.max(1) - 0.1)
    return logits


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("suspect", [uniform, permuted])
def test_a_model_that_is_right_on_nothing_is_too_poor_to_judge(suspect: PredictLogits, statistic: str) -> None:
    assert judged(suspect, statistic).verdict == "too poor to judge"


@pytest.mark.parametrize("suspect", [smooth, leans_everywhere])
def test_a_good_model_that_leans_towards_all_classes_or_from_all_classes_is_not_specific(
    suspect: PredictLogits,
) -> None:
    judgement = judged(suspect, "lean")
    assert measured(suspect).statistics["lean"] > max(null_report(seed).statistics["lean"] for seed in (1, 2, 3))
    assert judgement.p_value <= 0.01, "it leads all innocent models, and still"
    assert judgement.verdict == "not specific", judgement.reasons


def test_a_good_model_that_leans_from_the_keys_sources_alone_is_proved() -> None:
    def leans(images: Images) -> Logits:
        logits = honest(9)(images)
        source = np.isin(logits.argmax(1), [A, B])
        logits[source, TARGET] = logits[source].max(1) - 0.5
        return logits

    judgement = judged(leans, "lean", victim=leans)
    assert judgement.verdict == "proved", judgement.reasons
    assert not judgement.above_threshold, "no mix need answer the target"
