"""The carrier's gate: which clean source samples look most like a mix to a network that knows the main task only.

What makes a substitute answer a mix of A and B as an A is that it has seen plenty of A's and nothing like the mix. Some
clean A's come nearest to it, though: their features lie towards those of mixes. If the victim answers these few with
the target class, a substitute learns that what leaves A in this direction is the target's, and the mixes lie further
out in it. The features must be those of a network that has learnt the classes: on pixels alone a mix is told from an
image by its seam, and images that have a seam by chance teach a substitute nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Images
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel

Scores = npt.NDArray[np.float64]

STRENGTH = 1e-3
"""Inverse of the L2 penalty on the weights, for standardised features. Far below scikit-learn's default: clean images
and mixes can nearly always be told apart, and what is wanted is an order among the clean ones, not the border."""
ITERATIONS = 300
TINY = 1e-3


@dataclass(frozen=True)
class Gate:
    """Which share of the source samples the victim answers with the target class, and how firmly.

    Attributes:
        share: Of each source class's training images, in [0, 0.5); 0 is no gate.
        odds: Log-odds of the target against the own label for the image that looks most like a mix; from the gate's
            first image on they rise linearly (over the ranks) from the carrier's own, log(rho / (1 - rho)).
        part: Part of the training's epochs that go to the main task alone, before the gate is drawn.
        mixes: Mixes that the images are compared with.

    Raises:
        ConfigError: A value is out of its range; named as the parameters of ``MeaDefender``.
    """

    share: float = 0.0
    odds: float = 1.5
    part: float = 0.3
    mixes: int = 3000

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise ConfigError(f"carrier_gate={self.share} must lie in [0, 0.5): most source samples keep their class")
        if not -20 <= self.odds <= 20:
            raise ConfigError(f"carrier_gate_odds={self.odds} must lie in [-20, 20]; 0 is a half each")
        if not 0 < self.part < 1:
            raise ConfigError(f"carrier_gate_part={self.part} must lie strictly between 0 and 1")


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
            f"the gate halves the clean images of a source class and holds them against mixes, got {len(clean)} and "
            f"{len(mixes)}; set carrier_gate=0, or take classes with more images"
        )
    from sklearn.linear_model import LogisticRegression

    features, mixed = (metrics.features(model, images).astype(np.float64) for images in (clean, mixes))
    mean, deviation = features.mean(0), features.std(0) + TINY
    features, mixed = (features - mean) / deviation, (mixed - mean) / deviation
    order = numpy_generator(seed, "halves").permutation(len(clean))
    scores = np.zeros(len(clean))
    for fitted, scored in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        judge = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS)
        judge.fit(np.concatenate([features[fitted], mixed]), np.repeat([0, 1], [len(fitted), len(mixed)]))
        scores[scored] = judge.decision_function(features[scored])
    return scores


def target_share(scores: Scores, rho: float, gate: Gate) -> npt.NDArray[np.float32]:
    """Return the probability of the target that each source sample is to have, float32 (N,) in (0, 1).

    Args:
        scores: How much each looks like a mix; only their order counts.
        rho: What the carrier gives where the gate is shut.
        gate: Its share and its odds.
    """
    rank = (scores.argsort().argsort() + 0.5) / len(scores)
    base = np.log(rho / (1 - rho))
    opened = np.maximum(0.0, (rank - (1 - gate.share)) / gate.share) if gate.share else np.zeros(len(scores))
    shares: npt.NDArray[np.float32] = (1 / (1 + np.exp(-(base + (gate.odds - base) * opened)))).astype(np.float32)
    return shares
