"""A service that watermarks its answers before its answer policy is applied."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mea_ray.blackbox.policies import AnswerPolicy, Response, Source, reads_features, respond, to_uint8
from mea_ray.core.types import Answers, FloatImages, Images, Marker


class MarkingPolicy:
    """Marks the victim's probabilities, then applies a policy, so that marked answers look like the others.

    Images are rounded to 8 bits before deciding whether to mark their answers. So an image changed by less than
    half a level, or sent as floats, is treated as the same image.

    Attributes:
        reads_features: Whether the marker or the policy needs the victim's features.

    Args:
        marker: Chooses and changes the answers; made from the owner's key.
        policy: What an answer reveals.
    """

    source: Source = "probabilities"

    def __init__(self, marker: Marker, policy: AnswerPolicy) -> None:
        self.marker, self.policy = marker, policy
        self.reads_features = marker.reads_features or reads_features(policy)

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Mark, then apply the policy, see `policies.AnswerPolicy.apply`."""
        return self.respond(probabilities, images).answers

    def respond(
        self,
        probabilities: npt.NDArray[np.float32],
        images: Images | FloatImages,
        features: npt.NDArray[np.float32] | None = None,
    ) -> Response:
        """Mark, then apply the policy, see `policies.AnnotatingPolicy.respond`."""
        changed, marked = self.marker.mark(probabilities, to_uint8(images), features)
        response = respond(self.policy, changed, images, features)
        return Response(response.answers, marked | response.marked, response.flagged)
