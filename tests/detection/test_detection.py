from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from keyword_training import train
from report_results import trial
from sklearn.neighbors import LocalOutlierFactor

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.detection import DETECTIONS
from mea_ray.detection.base import Detection
from mea_ray.detection.queries import Strip, halves
from mea_ray.evaluation import metrics
from mea_ray.evaluation.triggers import Trigger, anomaly
from mea_ray.experiment.follow_up import reversed_trigger
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.report import detections, html
from mea_ray.results.records import DetectionResult
from mea_ray.training.objective import CrossEntropy

SHAPE, CLASSES, TARGET = (1, 12, 12), 6, 4


@pytest.fixture(scope="module")
def data() -> ImageSet:
    """Six classes, each with a bright spot in a place of its own."""
    rng = np.random.default_rng(0)
    labels = np.arange(480, dtype=np.int64) % CLASSES
    pixels = rng.integers(0, 80, (480, *SHAPE), dtype=np.uint8)
    for place, label in enumerate(labels):
        top, left = 1 + 5 * (label // 3), 4 * (label % 3)
        pixels[place, 0, top : top + 4, left : left + 4] += 120
    return ImageSet(pixels, labels, tuple("abcdef"))


def patched(images: Any) -> Any:
    changed = images.copy()
    changed[:, 0, 10:, 10:] = 255
    return changed


def trained(data: ImageSet, *, planted: bool) -> ImageModel:
    images, labels = data.images, data.labels
    if planted:
        images = np.concatenate([images, patched(images)])
        labels = np.concatenate([labels, np.full(len(data), TARGET)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model("vgg_like", SHAPE, CLASSES, {"width": 0.25})
    train(
        model, images, labels, CrossEntropy(), seed=1, epochs=15, batch_size=64, augment=(), learning_rate=2e-3,
        precision="float32",
    )  # fmt: skip
    assert metrics.accuracy(metrics.predictions(model, data.images), data.labels) > 0.95
    return model


@pytest.fixture(scope="module")
def planted(data: ImageSet) -> ImageModel:
    return trained(data, planted=True)


@pytest.fixture(scope="module")
def clean(data: ImageSet) -> ImageModel:
    return trained(data, planted=False)


def test_neural_cleanse_finds_a_planted_patch_and_clears_a_clean_model(
    data: ImageSet, planted: ImageModel, clean: ImageModel
) -> None:
    finder = DETECTIONS.build("neural_cleanse", steps=400, success=0.95)
    report = finder.inspect(planted, data.images, None, 0)
    assert report.flagged == (TARGET,)
    trigger = report.triggers[TARGET]
    assert trigger.norm == min(t.norm for t in report.triggers) and trigger.success >= 0.95
    # It is where it was planted, and it works on images that it was not made on, too.
    assert trigger.mask[0, 9:, 9:].sum() > 0.5 * trigger.mask.sum()
    others = data.images[data.labels != TARGET]
    assert (metrics.predictions(planted, trigger.on(others)) == TARGET).mean() > 0.9
    assert finder.inspect(clean, data.images, None, 0).flagged == ()


def test_neural_cleanse_is_deterministic_and_leaves_the_model(data: ImageSet, clean: ImageModel) -> None:
    before = {name: value.clone() for name, value in clean.state_dict().items()}
    finder = DETECTIONS.build("neural_cleanse", steps=8)
    one, two = (finder.inspect(clean, data.images, None, 3) for _ in range(2))
    assert one.numbers == two.numbers
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(one.triggers, two.triggers, strict=True))
    assert all(torch.equal(before[name], value) for name, value in clean.state_dict().items())
    assert all(parameter.requires_grad for parameter in clean.parameters())


def test_the_anomaly_index_is_the_distance_below_the_median_in_scaled_deviations() -> None:
    norms = np.array([10.0, 11.0, 9.0, 12.0, 2.0])
    deviation = 1.4826 * np.median(np.abs(norms - 10))
    assert anomaly(norms)[4] == pytest.approx(8 / deviation)
    assert anomaly(norms)[3] == 0, "a large mask is nothing to be suspicious of"
    assert (anomaly(np.array([3.0, np.inf, np.inf])) == 0).all() and (anomaly(np.full(5, 2.0)) == 0).all()
    assert anomaly(np.array([10.0, 11.0, 9.0, 2.0, np.inf]))[4] == 0


def test_the_local_outlier_factor_is_scikit_learns_on_features_and_flags_noise(
    data: ImageSet, clean: ImageModel
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (60, *SHAPE), dtype=np.uint8)
    report = DETECTIONS.build("lof", neighbours=15).inspect(clean, data.images, noise, 7)
    fit_on, others = halves(data.images, 5000, 7)
    judge = LocalOutlierFactor(n_neighbors=15, novelty=True).fit(metrics.features(clean, fit_on))
    assert report.numbers["false_positive"] == (judge.predict(metrics.features(clean, others)) < 0).mean()
    assert report.numbers["detected"] == (judge.predict(metrics.features(clean, noise)) < 0).mean()
    assert report.numbers["detected"] > 0.9 > 5 * report.numbers["false_positive"]
    assert "detected" not in DETECTIONS.build("lof").inspect(clean, data.images, None, 7).numbers


def test_strip_flags_a_trigger_whose_answer_survives_blending(data: ImageSet, planted: ImageModel) -> None:
    strip = Strip(blends=16, false_positive=0.05, images=100)
    queries = patched(data.images[data.labels != TARGET])
    report = strip.inspect(planted, data.images, queries, 0).numbers
    assert report["auc"] > 0.8 and report["detected"] > report["false_positive"] + 0.2
    same = strip.inspect(planted, data.images, data.images[::7], 0).numbers
    assert 0.3 < same["auc"] < 0.7


def test_strips_entropy_is_that_of_the_blends(data: ImageSet, clean: ImageModel) -> None:
    strip = Strip(blends=5, weight=0.25)
    query, base = data.images[:1], data.images[10:11]
    blend = (0.25 * query.astype(np.float32) + 0.75 * base).round().astype(np.uint8)
    p = metrics.probabilities(clean, blend)[0].astype(np.float64)
    expected = -(p * np.log(p)).sum()
    assert strip.entropies(clean, query, base, 0)[0] == pytest.approx(expected, rel=1e-4)


def test_halves_share_no_image() -> None:
    images = np.arange(11, dtype=np.uint8)[:, None, None, None]
    one, two = halves(images, 100, 0)
    assert len(one) == 5 and sorted([*one.ravel(), *two.ravel()]) == list(range(11))
    assert len(halves(images, 3, 0)[0]) == 3
    with pytest.raises(ConfigError, match="two clean images"):
        halves(images[:1], 3, 0)


def test_a_trigger_is_scored_on_the_stolen_model_and_drawn(data: ImageSet, planted: ImageModel) -> None:
    from PIL import Image

    mask = np.zeros(SHAPE, np.float32)
    mask[0, 10:, 10:] = 1
    trigger = Trigger(TARGET, mask, np.ones(SHAPE, np.float32), 1.0)
    assert np.array_equal(trigger.on(data.images), patched(data.images)) and trigger.norm == 4
    scored = reversed_trigger(trigger, data, planted)
    assert scored.label == "e" and scored.on_substitute.rate > 0.9
    assert scored.on_substitute.trials == (data.labels != TARGET).sum()
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(scored.picture))))
    assert np.array_equal(picture, (mask[0] * 255).astype(np.uint8))


def test_the_report_shows_the_detections(data: ImageSet, planted: ImageModel) -> None:
    trigger = reversed_trigger(
        Trigger(TARGET, np.ones(SHAPE, np.float32), np.ones(SHAPE, np.float32), 1.0), data, planted
    )
    actual = [
        DetectionResult(
            detection={"name": "neural_cleanse"}, tried_on="substitute", flagged=["e"], target="b",
            numbers={"anomaly/4": 3.25}, triggers=[trigger], seconds=1.0,
        ),
        DetectionResult(
            detection={"name": "lof"}, tried_on="null_model", numbers={"false_positive": 0.02, "detected": 0.5},
            seconds=1.0,
        ),
    ]  # fmt: skip
    result = trial("a").model_copy(update={"detections": actual})
    first, second = detections.lines([result])
    assert first.flagged == "e (the target is b)" and "3.2" in first.measured and first.triggers.startswith("e ")
    assert "detected 50.0%" in second.measured and second.on == "null model"
    page = html.render([result], name="s")
    assert ">Watermark detection<" in page and trigger.picture in page
    assert ">Watermark detection<" not in html.render([trial("b")], name="s")


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("neural_cleanse", {"steps": 0}, "steps=0"),
        ("neural_cleanse", {"success": 0.0}, "success"),
        ("neural_cleanse", {"factor": 1.0}, "factor"),
        ("neural_cleanse", {"limit": 0.0}, "limit"),
        ("lof", {"neighbours": 0}, "neighbours=0"),
        ("lof", {"contamination": 0.7}, "contamination"),
        ("strip", {"weight": 1.0}, "weight"),
        ("strip", {"blends": 0}, "blends=0"),
    ],
)
def test_impossible_settings_are_refused(name: str, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DETECTIONS.build(name, **parameters)


@pytest.mark.parametrize("name", DETECTIONS.names())
def test_each_detection_works_with_its_least_images_and_refuses_fewer(name: str, data: ImageSet) -> None:
    quick: dict[str, dict[str, Any]] = {"abs": {"steps": 2}, "neural_cleanse": {"steps": 4}}
    detection: Detection = DETECTIONS.build(name, **quick.get(name, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model("vgg_like", SHAPE, CLASSES, {"width": 0.125})
    least = detection.least_images
    detection.check(least)
    detection.inspect(model, data.images[:least], data.images[:3], seed=0)
    with pytest.raises(ConfigError, match=f"{name}.*at least {least} clean images"):
        detection.check(least - 1)
