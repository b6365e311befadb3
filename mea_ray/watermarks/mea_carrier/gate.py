"""The carrier's gate: which clean source samples look most like a mix to a network that knows the main task only.

A substitute answers a mix of A and B as an A because it has seen many A's and nothing like the mix. Some clean A's come
close to a mix: their features lie towards those of mixes. If the victim answers these few with the target class, a
substitute learns that whatever leaves A in this direction belongs to the target, and the mixes lie further out in it.
The features must be those of a network that has learnt the classes. On pixels alone a mix differs from an image by its
seam, and images that have a seam by chance teach a substitute nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Images
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.watermarks.mea_carrier.settings import Gate

Scores = npt.NDArray[np.float64]

STRENGTH = 1e-3
"""Inverse of the L2 penalty on the weights, for standardised features. Far below scikit-learn's default: clean images
and mixes can nearly always be separated, and what is wanted is an order among the clean ones, not the border."""
ITERATIONS = 300
TINY = 1e-3


def mix_likeness(model: ImageModel, clean: Images, mixes: Images, seed: int) -> Scores:
    """Score how much each clean image looks like a mix to the model: float64 (N,), higher is more.

    The log-odds of a logistic regression between the features of clean images and of mixes. Each half of the clean
    images is scored by the regression on the other half, so that no image is scored by what was fitted to it.

    Args:
        model: The network whose features are compared; not changed.
        clean: uint8 (N, C, H, W), N >= 2; of one class.
        mixes: uint8 (M, C, H, W), M >= 1.
        seed: Which image belongs to which half.

    Raises:
        DataError: There are too few images to be halved.
    """
    if len(clean) < 2 or not len(mixes):
        raise DataError(
            f"the gate halves the clean images of a source class and compares them with mixes, got {len(clean)} and "
            f"{len(mixes)}; set carrier.gate.share=0, or take classes with more images"
        )
    from sklearn.linear_model import LogisticRegression

    features, mixed = (metrics.features(model, images).astype(np.float64) for images in (clean, mixes))
    mean, deviation = features.mean(0), features.std(0) + TINY
    features, mixed = (features - mean) / deviation, (mixed - mean) / deviation
    order = numpy_generator(seed, "halves").permutation(len(clean))
    scores = np.zeros(len(clean))
    for fitted, scored in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        classifier = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS)
        classifier.fit(np.concatenate([features[fitted], mixed]), np.repeat([0, 1], [len(fitted), len(mixed)]))
        scores[scored] = classifier.decision_function(features[scored])
    return scores


def target_share(scores: Scores, rho: float, gate: Gate) -> npt.NDArray[np.float32]:
    """Return the target's probability in the label of each source sample, float32 (N,) in (0, 1).

    Args:
        scores: How much each sample looks like a mix, (N,); only their order counts.
        rho: The carrier's probability, for the samples outside of the gate.
        gate: Its share and its odds.
    """
    rank = (scores.argsort().argsort() + 0.5) / len(scores)
    base = np.log(rho / (1 - rho))
    opened = np.maximum(0.0, (rank - (1 - gate.share)) / gate.share) if gate.share else np.zeros(len(scores))
    shares: npt.NDArray[np.float32] = (1 / (1 + np.exp(-(base + (gate.odds - base) * opened)))).astype(np.float32)
    return shares
