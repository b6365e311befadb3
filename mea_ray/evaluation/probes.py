"""Probes: heads fitted on the features of labelled images, so that an encoder classifies. The encoder stays fixed."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import ImageSet, Labels
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel

Reading = Literal["linear_probe", "linear_probe_cv", "prototype"]
Features = npt.NDArray[np.float32]

ITERATIONS = 500
STRENGTH = 1.0
"""Inverse of the L2 penalty on the weights, for standardised features; scikit-learn's default."""
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Candidates for cross-validation."""
FOLDS = 3
TINY = 1e-6


def read(model: ImageModel, labelled: ImageSet, reading: Reading = "linear_probe") -> None:
    """Fit the head of an encoder in place, so that it classifies. Its previous head does not matter.

    Args:
        model: The encoder. Its head must be one linear layer.
        labelled: Clean images with labels, at least one of each class.
        reading: ``linear_probe``: multinomial logistic regression on standardised features. ``linear_probe_cv``: the
            same with the penalty that cross-validation chooses, see ``best_strength``. ``prototype``: the class whose
            mean feature has the largest cosine similarity with the feature, both centred.

    Raises:
        ConfigError: The reading is unknown, or the model's head is not linear.
        DataError: A class has no image.
    """
    check(model, labelled.labels, reading)
    assert isinstance(model.head, nn.Linear)
    features = metrics.features(model, labelled.images)
    if not np.isfinite(features).all():
        raise DataError("the encoder gives features that are not finite; lower training.learning_rate")
    if reading in {"linear_probe", "linear_probe_cv"}:
        weights, bias = linear_probe(features, labelled.labels, cross_validate=reading == "linear_probe_cv")
    else:
        weights, bias = prototypes(features, labelled.labels, model.classes)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weights))
        model.head.bias.copy_(torch.from_numpy(bias))


def check(model: ImageModel, labels: Labels, reading: Reading) -> None:
    """Refuse what ``read`` could not fit; nothing is computed.

    Args:
        model: The encoder; it may be on torch's ``meta`` device.
        labels: Of the images that the probe would be fitted on, int64 (N,).
        reading: See ``read``.

    Raises:
        ConfigError: The reading is unknown, or the model's head is not linear.
        DataError: A class has no image, or too few for cross-validation.
    """
    if reading not in get_args(Reading):
        raise ConfigError(f"reading={reading!r} must be linear_probe, linear_probe_cv or prototype")
    if not isinstance(model.head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear head to fit a probe in; use another network")
    missing = sorted(set(range(model.classes)) - set(labels.tolist()))
    if missing:
        raise DataError(
            f"class {missing[0]} has none of the {len(labels)} labelled images that the probe is fitted on; raise "
            "verification.probe_images"
        )
    if reading == "linear_probe_cv":
        _check_folds(labels)


def _check_folds(labels: metrics.Predictions) -> None:
    rarest, count = min(enumerate(np.bincount(labels)), key=lambda pair: pair[1])
    if count < FOLDS:
        raise DataError(
            f"class {rarest} has {count} labelled images, fewer than the {FOLDS} folds of linear_probe_cv; raise "
            "verification.probe_images, or set verification.reading to linear_probe"
        )


def linear_probe(
    features: Features, labels: metrics.Predictions, *, cross_validate: bool = False
) -> tuple[Features, Features]:
    """Fit a multinomial logistic regression on standardised features, and fold the standardisation into the weights.

    Args:
        features: float32 (N, D).
        labels: int (N,), every class 0 .. K - 1 at least once.
        cross_validate: Choose the penalty by ``best_strength``; otherwise it is ``STRENGTH``.

    Returns:
        Weights (K, D) and biases (K,), float32, for features that are not standardised.

    Raises:
        DataError: A class has too few samples for cross-validation.
    """
    from sklearn.linear_model import LogisticRegression

    wide = features.astype(np.float64)
    mean, deviation = wide.mean(0), wide.std(0)
    # A constant feature carries no information; the penalty makes its weight 0.
    deviation[deviation < TINY * max(float(deviation.max()), 1.0)] = np.inf
    scaled = (wide - mean) / deviation
    strength = best_strength(scaled, labels) if cross_validate else STRENGTH
    fitted = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(scaled, labels)
    weights, bias = fitted.coef_, fitted.intercept_
    if len(weights) == 1:  # scikit-learn gives one row for two classes
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    weights = weights / deviation
    return weights.astype(np.float32), (bias - weights @ mean).astype(np.float32)


def best_strength(scaled: npt.NDArray[np.float64], labels: metrics.Predictions) -> float:
    """Return the inverse penalty with the smallest log-loss in cross-validation on the labelled images.

    With too weak a penalty the probe decides by directions in which features hardly vary. Only clean images are used.

    Args:
        scaled: float64 (N, D).
        labels: int (N,).

    Raises:
        DataError: A class has fewer samples than there are folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    _check_folds(labels)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    search = GridSearchCV(
        LogisticRegression(max_iter=ITERATIONS), {"C": STRENGTHS}, scoring="neg_log_loss", cv=folds, refit=False
    )
    return float(search.fit(scaled, labels).best_params_["C"])


def prototypes(features: Features, labels: metrics.Predictions, classes: int) -> tuple[Features, Features]:
    """Return the directions of the centred class means as weights (K, D), with biases (K,) that centre a feature.

    The length of a centred feature scales all its logits alike, so that the class with the largest cosine similarity is
    the most probable. Without centring, features after a ReLU have nearly the same cosine with all means.
    """
    means = np.stack([features[labels == label].mean(0, dtype=np.float64) for label in range(classes)])
    centre = means.mean(0)
    means -= centre
    means /= np.linalg.norm(means, axis=1, keepdims=True).clip(TINY)
    return means.astype(np.float32), (-means @ centre).astype(np.float32)


def knn_accuracy(model: ImageModel, labelled: ImageSet, test: ImageSet, *, neighbours: int = 20) -> float:
    """Return the accuracy on ``test`` of a vote of the nearest labelled images, by cosine similarity; in [0, 1].

    Args:
        model: The encoder.
        labelled: Images that vote.
        test: Images to classify.
        neighbours: Number of votes; fewer if there are fewer labelled images.

    References:
        Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018, section 3.4.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    vote = KNeighborsClassifier(min(neighbours, len(labelled)), algorithm="brute")
    vote.fit(normalize(metrics.features(model, labelled.images)), labelled.labels)
    return float(vote.score(normalize(metrics.features(model, test.images)), test.labels))
