"""A service that answers abnormal queries at random: MEA-Defender's defence against abnormal queries."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mea_ray.blackbox.policies import (
    AnnotatingPolicy,
    AnswerPolicy,
    FittedPolicy,
    KeyedPolicy,
    Response,
    Source,
    image_generator,
    pixel_vectors,
    respond,
    to_uint8,
)
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.evaluation.local_outlier_factor import fit_outliers, outside


class OutlierFilter:
    """Flags queries that are local outliers relative to the owner's images, and shuffles their answers.

    Choose it for an API that gives useless answers to unusual queries.

    A flagged image is answered with the victim's probabilities in a random order. The order follows from the image and
    a secret, so repeating the query gives the same answer, and its confidence looks normal. All other answers are
    unchanged. The secret follows from the victim's weights (`KeyedPolicy`). The paper does not specify neighbours,
    threshold and features. The filter is fitted once, by the service.

    The features of a small network make a weak filter: on digits, noise is flagged only four times as often as a
    held-out digit (17% of noise images). On pixels, noise is always flagged.

    Args:
        neighbours: Number of nearest neighbours for density estimation.
        contamination: Fraction of the fitted images that count as outliers, in (0, 0.5]; null is scikit-learn's
            ``auto``.
        on: Vectors to compare: the victim's last ``features``, or ``pixels``.
        fitted: Maximum number of images of the victim's training set to fit on.
        wording: What an answer reveals: another policy, by name or as a mapping with ``name`` and parameters.
        seed: Seed of the orders and of the images to fit on. It is not secret.

    References:
        Breunig et al., LOF, SIGMOD 2000; Lv et al., MEA-Defender, 2024, table IX.

    Raises:
        ConfigError: ``wording`` is not a policy on probabilities.
    """

    version: ClassVar[int] = 2  # 2: the orders do not follow from the seed alone
    source: Source = "probabilities"

    def __init__(
        self,
        *,
        neighbours: Annotated[int, Field(ge=1)] = 20,
        contamination: Annotated[float, Field(gt=0, le=0.5)] | None = None,
        on: Literal["features", "pixels"] = "features",
        fitted: Annotated[int, Field(ge=2)] = 5000,
        wording: dict[str, Any] | str = "probabilities",
        seed: int = 0,
    ) -> None:
        self.neighbours, self.contamination, self.fitted, self.seed = neighbours, contamination, fitted, seed
        self.fits_on = on
        self.reads_features = on == "features"
        self.wording = _policy(wording)
        self._detector: Any = None
        self._secret = secrets.token_bytes(32)

    def use_secret(self, secret: bytes) -> None:
        """Draw orders from a secret, see `KeyedPolicy.use_secret`."""
        self._secret = secret
        if isinstance(self.wording, KeyedPolicy):
            self.wording.use_secret(secret)

    def choose(self, clean: Images) -> Images:
        """Choose the images to fit on among the owner's training images, uint8 (N, C, H, W)."""
        return clean[numpy_generator(self.seed, "fitted").permutation(len(clean))[: self.fitted]]

    def fit(self, clean: npt.NDArray[np.float32]) -> None:
        """Fit the outlier detector on vectors of the chosen images: features or pixels, (N, F)."""
        self._detector = fit_outliers(clean, self.neighbours, self.contamination)

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Answer by pixels, see `policies.AnswerPolicy.apply`; a filter on features needs `respond`."""
        return self.respond(probabilities, images).answers

    def respond(
        self,
        probabilities: npt.NDArray[np.float32],
        images: Images | FloatImages,
        features: npt.NDArray[np.float32] | None = None,
    ) -> Response:
        """Shuffle the answers to outliers, then apply the inner policy, see `policies.AnnotatingPolicy.respond`.

        Raises:
            DataError: The filter was not fitted, or features are missing.
        """
        if self._detector is None:
            raise DataError("the answer policy lof is not fitted on the owner's images; call fit before it answers")
        if self.reads_features and features is None:
            raise DataError("the answer policy lof needs features; pass the victim's, or set on=pixels")
        flagged = outside(self._detector, features if features is not None else pixel_vectors(images))
        shuffled = np.array(probabilities, dtype=np.float32)
        for row in np.flatnonzero(flagged):
            (image,) = to_uint8(images[row : row + 1])
            shuffled[row] = image_generator(self._secret, self.seed, image).permutation(shuffled[row])
        response = respond(self.wording, shuffled, images)
        return Response(response.answers, response.marked, flagged)


def _policy(choice: dict[str, Any] | str) -> AnswerPolicy:
    """Build the policy that is applied after the filter; it must be a plain policy on probabilities."""
    from mea_ray.blackbox import POLICIES

    parameters = {"name": choice} if isinstance(choice, str) else dict(choice)
    try:
        policy: AnswerPolicy = POLICIES.build(str(parameters.pop("name", "")), **parameters)
    except ConfigError as error:
        raise ConfigError(f"wording={choice!r} of the answer policy lof: {error}") from None
    if policy.source != "probabilities" or isinstance(policy, (AnnotatingPolicy, FittedPolicy)):
        raise ConfigError(f"wording={choice!r} of the answer policy lof must be a plain policy on probabilities")
    return policy
