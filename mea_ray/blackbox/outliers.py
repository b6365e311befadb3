"""A service that answers abnormal queries at random: the defence of MEA-Defender's section on abnormal queries."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mea_ray.blackbox.policies import Policy, Source, Told, eight_bits, image_generator, tell
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.evaluation.local_outlier_factor import check_outliers, fit_outliers, outside


class OutlierFilter:
    """Flags queries that are local outliers among the owner's own images, and shuffles the answers to them.

    A flagged image is answered with the victim's probabilities in an order that follows from the image and the secret
    seed: a random label with a confidence like any other's, and the same one when it is asked again. Nothing else is
    changed. Neighbours, threshold and features are left open by the paper. It is fitted once, on the service's side.

    A network that knows few things sees them everywhere: among the features of a small one trained on digits, noise is
    an outlier four times as often as a held-out digit (17% of it), and among the pixels always.

    Args:
        neighbours: Nearest neighbours that a density is estimated from.
        contamination: Part of the images fitted on that lies outside, in (0, 0.5]; null is scikit-learn's ``auto``.
        on: What is compared: ``features``, the victim's last ones, or ``pixels``.
        fitted: Images of the victim's training set that it is fitted on, at most.
        wording: What an answer holds: another policy, by name or as a mapping with ``name`` and parameters.
        seed: The owner's secret: order of flagged answers, and the images fitted on.

    References:
        Breunig et al., LOF, SIGMOD 2000; Lv et al., MEA-Defender, 2024, table IX.

    Raises:
        ConfigError: A value is out of its range, or the wording is none of a classifier's answers.
    """

    source: Source = "probabilities"

    def __init__(
        self,
        *,
        neighbours: int = 20,
        contamination: float | None = None,
        on: Literal["features", "pixels"] = "features",
        fitted: int = 5000,
        wording: dict[str, Any] | str = "probabilities",
        seed: int = 0,
    ) -> None:
        check_outliers(neighbours, contamination, fitted)
        self.neighbours, self.contamination, self.fitted, self.seed = neighbours, contamination, fitted, seed
        self.reads_features = on == "features"
        self.wording = _wording(wording)
        self._judge: Any = None

    def choose(self, clean: Images) -> Images:
        """Return the images that it is fitted on, of the owner's uint8 (N, C, H, W)."""
        return clean[numpy_generator(self.seed, "fitted").permutation(len(clean))[: self.fitted]]

    def fit(self, clean: npt.NDArray[np.float32]) -> None:
        """Learn what is normal: features (N, F), or ``pixels`` of the images that it chose."""
        self._judge = fit_outliers(clean, self.neighbours, self.contamination)

    @staticmethod
    def pixels(images: Images | FloatImages) -> npt.NDArray[np.float32]:
        """Return images as vectors: float32 (N, C * H * W), in [0, 1]."""
        flat: npt.NDArray[np.float32] = eight_bits(images).reshape(len(images), -1).astype(np.float32) / np.float32(255)
        return flat

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Answer by pixels, see `policies.Policy.apply`; a filter on features has to `tell`."""
        return self.tell(probabilities, images).answers

    def tell(
        self,
        probabilities: npt.NDArray[np.float32],
        images: Images | FloatImages,
        features: npt.NDArray[np.float32] | None = None,
    ) -> Told:
        """Shuffle the answers to outliers, then word all, see `policies.Telling.tell`.

        Raises:
            DataError: It was not fitted, or features are missing.
        """
        if self._judge is None:
            raise DataError("the answer policy lof was not fitted on the owner's images; call fit before it answers")
        if self.reads_features and features is None:
            raise DataError("the answer policy lof looks at features; give it the victim's, or set on=pixels")
        flagged = outside(self._judge, features if features is not None else self.pixels(images))
        shuffled = np.array(probabilities, dtype=np.float32)
        for row in np.flatnonzero(flagged):
            (image,) = eight_bits(images[row : row + 1])
            shuffled[row] = image_generator(self.seed, image).permutation(shuffled[row])
        told = tell(self.wording, shuffled, images)
        return Told(told.answers, told.marked, flagged)


def _wording(chosen: dict[str, Any] | str) -> Policy:
    from mea_ray.blackbox import POLICIES

    parameters = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    plain = [name for name in POLICIES.names() if name != "lof" and POLICIES.resolve(name).source == "probabilities"]  # type: ignore[attr-defined]
    name = parameters.pop("name", None)
    if name not in plain:
        raise ConfigError(f"wording of the answer policy lof is {name!r}; choose one of {', '.join(plain)}")
    policy: Policy = POLICIES.build(name, **parameters)
    return policy
