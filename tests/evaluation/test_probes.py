from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics, probes
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model

SHAPE = (3, 16, 16)


def data(count: int = 120, classes: int = 3, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    images = rng.integers(0, 150, (count, *SHAPE), dtype=np.uint8)
    images[np.arange(count), labels % 3] += 60
    return ImageSet(images, labels, tuple("abc"[:classes]))


def encoder(classes: int = 3) -> ImageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model("vgg_like", SHAPE, classes, {"width": 0.1}).eval()


@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_probe_is_logistic_regression_on_standardised_features(classes: int) -> None:
    model, labelled, test = encoder(classes), data(classes=classes), data(90, classes, seed=1)
    probes.read(model, labelled)
    scaler = StandardScaler().fit(metrics.features(model, labelled.images).astype(np.float64))
    fitted = LogisticRegression(max_iter=500).fit(
        scaler.transform(metrics.features(model, labelled.images)), labelled.labels
    )
    expected = fitted.predict_proba(scaler.transform(metrics.features(model, test.images)))
    np.testing.assert_allclose(metrics.probabilities(model, test.images), expected, atol=2e-3)


def noisy(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    features = rng.normal(0, 1, (count, 40))
    features[np.arange(count), labels] += 1.0
    return features.astype(np.float32), labels.astype(np.int64)


def test_cross_validation_chooses_the_penalty_of_the_least_log_loss_on_held_out_folds() -> None:
    features, labels = noisy(150, 0)
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    lost: dict[float, float] = {}
    for strength in probes.STRENGTHS:
        parts = []
        for train, values in StratifiedKFold(3, shuffle=True, random_state=0).split(scaled, labels):
            fitted = LogisticRegression(C=strength, max_iter=500).fit(scaled[train], labels[train])
            parts.append(-np.log(fitted.predict_proba(scaled[values])[np.arange(len(values)), labels[values]]).mean())
        lost[strength] = float(np.mean(parts))
    best = min(lost, key=lambda strength: lost[strength])
    assert best < probes.STRENGTH, "few samples of many dimensions want a strong penalty"
    assert probes.best_strength(scaled, labels) == best
    weights, bias = probes.linear_probe(features, labels, cross_validate=True)
    fitted = LogisticRegression(C=best, max_iter=500).fit(scaled, labels)
    queries = noisy(60, 1)[0]
    scaler = StandardScaler().fit(features.astype(np.float64))
    expected = fitted.predict_proba(scaler.transform(queries.astype(np.float64)))
    outputs = torch.softmax(torch.from_numpy(queries @ weights.T + bias), 1).numpy()
    np.testing.assert_allclose(outputs, expected, atol=2e-3)
    plain = probes.linear_probe(features, labels)[0]
    assert np.abs(weights).sum() < np.abs(plain).sum()


def test_a_model_is_read_with_the_penalty_of_cross_validation_on_request() -> None:
    first, second, labelled = encoder(), encoder(), data()
    probes.read(first, labelled, "linear_probe_cv")
    weights, _ = probes.linear_probe(metrics.features(second, labelled.images), labelled.labels, cross_validate=True)
    np.testing.assert_allclose(first.state_dict()["head.weight"].numpy(), weights, rtol=1e-5)


def test_prototypes_name_the_class_of_the_largest_cosine() -> None:
    model, labelled, test = encoder(), data(), data(60, seed=2)
    probes.read(model, labelled, "prototype")
    features, queries = metrics.features(model, labelled.images), metrics.features(model, test.images)
    means = np.stack([features[labelled.labels == label].mean(0) for label in range(3)])
    queries, means = queries - means.mean(0), means - means.mean(0)
    cosines = [[a @ m / np.linalg.norm(a) / np.linalg.norm(m) for m in means] for a in queries]
    assert (metrics.predictions(model, test.images) == np.argmax(cosines, 1)).all()


def test_a_reading_leaves_the_encoder_alone_and_does_not_depend_on_the_head() -> None:
    model, labelled = encoder(), data()
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head")}
    probes.read(model, labelled)
    first = metrics.logits(model, labelled.images)
    with torch.no_grad():
        model.head.weight.fill_(7.0)  # type: ignore[union-attr, operator]
    probes.read(model, labelled)
    assert np.array_equal(first, metrics.logits(model, labelled.images))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_neighbours_vote_by_cosine() -> None:
    model, labelled, test = encoder(), data(60), data(40, seed=3)
    near, queries = metrics.features(model, labelled.images), metrics.features(model, test.images)
    near, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (near, queries))
    right = 0
    for row, label in zip(queries, test.labels, strict=True):
        votes = np.bincount(labelled.labels[np.argsort(-(near @ row))[:5]], minlength=3)
        right += int(votes.argmax() == label)
    assert probes.knn_accuracy(model, labelled, test, neighbours=5) == pytest.approx(right / 40)


def test_what_cannot_be_read_is_refused() -> None:
    labelled = data()
    with pytest.raises(DataError, match="class 2 has none of the 80"):
        probes.read(encoder(), labelled.take(np.flatnonzero(labelled.labels != 2)))
    few = labelled.take(
        np.concatenate([np.flatnonzero(labelled.labels != 2), np.flatnonzero(labelled.labels == 2)[:2]])
    )
    with pytest.raises(DataError, match="class 2 has 2 labelled images, fewer than the 3 folds"):
        probes.read(encoder(), few, "linear_probe_cv")
    with pytest.raises(ConfigError, match="linear_probe, linear_probe_cv or prototype"):
        probes.read(encoder(), labelled, "oracle")  # type: ignore[arg-type]
    model = encoder()
    model.head = torch.nn.Sequential(*model.head.children())
    with pytest.raises(ConfigError, match="no linear head"):
        probes.read(model, labelled)
