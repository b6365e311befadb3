"""Principal components of images, and what soft answers say beyond the top class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images

Rows = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
SCALE_IMAGES = 2000
"""Most images that components and their spread are measured on."""
FLOOR = 1e-4
"""Added to probabilities before logarithms are correlated: smaller ones are noise."""


def flat(images: Images) -> Wide:
    """Return images as rows of pixels, float64 (N, pixels)."""
    rows: Wide = images.reshape(len(images), -1).astype(np.float64)
    return rows


def principal_components(images: Images, wanted: int, seed: int, *, symmetric: bool = False) -> dict[str, Wide]:
    """Return ``axes`` (r, pixels) and ``centre`` (r,): axes @ pixels - centre has mean 0 and variance 1 on each axis.

    Args:
        images: uint8 (N, C, H, W).
        wanted: Components.
        seed: Of the images that are looked at, and of the solver.
        symmetric: Take the components of the mean of each image and its mirror image: an image and its mirror image
            then have the same coordinates.

    Raises:
        ConfigError: All images are equal.
    """
    from sklearn.decomposition import PCA

    sample = images[numpy_generator(seed, "images").permutation(len(images))[:SCALE_IMAGES]]
    chosen = (flat(sample) + flat(sample[..., ::-1])) / 2 if symmetric else flat(sample)
    if not np.ptp(chosen, axis=0).any():
        raise ConfigError("all training images are equal, so that no direction tells them apart; take other data")
    count = min(wanted, len(chosen) - 1, chosen.shape[1])
    pca = PCA(count, svd_solver="randomized", random_state=derive(seed, "solver") % 2**32).fit(chosen)
    positive = pca.explained_variance_ > 1e-6 * max(float(pca.explained_variance_[0]), 1e-6)
    axes = pca.components_[positive] / np.sqrt(pca.explained_variance_[positive])[:, None]
    return {"axes": axes, "centre": axes @ pca.mean_}


def residual(logits: Rows) -> Wide:
    """Return log-probabilities less their class's mean where it is not the answer; 0 at the answer: float64 (N, K).

    Args:
        logits: float32 (N, K).
    """
    scores = np.log(softmax(logits.astype(np.float64), axis=1) + FLOOR)
    other = np.ones_like(scores)
    other[np.arange(len(scores)), logits.argmax(1)] = 0.0
    means = (scores * other).sum(0) / np.maximum(other.sum(0), 1)
    scaled: Wide = (scores - means) * other
    return scaled
