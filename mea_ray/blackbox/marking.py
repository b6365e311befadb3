"""A service that marks its own answers, whatever it then lets out of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mea_ray.blackbox.policies import Policy, Source, Told, eight_bits, reads_features, tell
from mea_ray.core.types import Answers, FloatImages, Images, Marker


class MarkedAnswers:
    """Changes the victim's probabilities first and words them then, so that a marked answer looks like any other.

    The decision is about images of 8 bits: an image that was changed by less than half a step, or sent as floats, is
    the same image.

    Args:
        marker: The owner's, from the key.
        policy: What an answer holds.
    """

    source: Source = "probabilities"

    def __init__(self, marker: Marker, policy: Policy) -> None:
        self.marker, self.policy = marker, policy
        self.reads_features = reads_features(policy)

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Mark, then word, see `policies.Policy.apply`."""
        return self.tell(probabilities, images).answers

    def tell(
        self,
        probabilities: npt.NDArray[np.float32],
        images: Images | FloatImages,
        features: npt.NDArray[np.float32] | None = None,
    ) -> Told:
        """Mark, then word, see `policies.Telling.tell`."""
        changed, marked = self.marker.mark(probabilities, eight_bits(images))
        told = tell(self.policy, changed, images, features)
        return Told(told.answers, marked | told.marked, told.flagged)
