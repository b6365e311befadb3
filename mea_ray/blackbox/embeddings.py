"""Answer policies of a feature API: how much of an encoder's features it reveals, row by row."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mea_ray.blackbox.policies import Source
from mea_ray.core.types import Answers, FloatImages, Images

Features = npt.NDArray[np.float32]
TINY = np.float32(1e-12)


class PlainEmbedding:
    """The features, as the encoder computes them.

    Choose it for an API that sells an encoder's features.
    """

    source: Source = "features"

    def apply(self, features: Features, images: Images | FloatImages) -> Answers:
        """Return float32 features (N, feature_size), see `policies.AnswerPolicy.apply`."""
        return np.array(features, dtype=np.float32)


class NormalisedEmbedding:
    """The features scaled to L2 norm 1. A row of zeros is unchanged.

    Choose it for an API that sells features of length 1.
    """

    source: Source = "features"

    def apply(self, features: Features, images: Images | FloatImages) -> Answers:
        """Divide each row by its L2 norm, see `policies.AnswerPolicy.apply`."""
        norms = np.sqrt(np.square(features.astype(np.float64)).sum(axis=1, keepdims=True))
        answers: Answers = (features / np.maximum(norms, TINY)).astype(np.float32)
        return answers


class RoundedEmbedding:
    """Features scaled to L2 norm 1 and rounded.

    Choose it for an API that rounds the features that it sells.

    Args:
        decimals: Number of decimals.
    """

    source: Source = "features"

    def __init__(self, *, decimals: Annotated[int, Field(ge=0)] = 2) -> None:
        self.decimals = decimals

    def apply(self, features: Features, images: Images | FloatImages) -> Answers:
        """Normalise and round each row, see `policies.AnswerPolicy.apply`."""
        unit = NormalisedEmbedding().apply(features, images).astype(np.float64)
        return np.round(unit, self.decimals).astype(np.float32)
