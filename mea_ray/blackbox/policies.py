"""Answer policies: what a query API lets out of a classifier's probabilities.

Every policy works row by row, so that an answer depends on its own image only and never on what it was merged with.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Answers, FloatImages, Images

Source = Literal["probabilities", "features"]
"""What a policy is given of the victim: a classifier's probabilities, or an encoder's features."""


class Policy(Protocol):
    """How an API words its answers."""

    source: Source
    """What ``apply`` is given."""

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Turn probabilities into answers.

        Args:
            probabilities: float32 (N, K), rows sum to 1.
            images: What was asked, uint8 or float32 in [0, 1], (N, C, H, W).

        Returns:
            float32 (N, K), a new array.
        """
        ...


@dataclass(frozen=True)
class Told:
    """Answers as they leave, and what only the owner knows of them.

    Attributes:
        answers: float32 (N, K).
        marked: Images whose answer carries a mark, bool (N,).
        flagged: Images that look abnormal to the service, bool (N,).
    """

    answers: Answers
    marked: npt.NDArray[np.bool_]
    flagged: npt.NDArray[np.bool_]

    @classmethod
    def plain(cls, answers: Answers) -> Told:
        """Return answers that are all treated alike."""
        none = np.zeros(len(answers), bool)
        return cls(answers, none, none)


@runtime_checkable
class Telling(Protocol):
    """A policy that treats some images otherwise than others, and tells its owner which."""

    source: Source
    reads_features: bool
    """Whether ``tell`` needs the victim's features beside its probabilities."""

    def tell(
        self,
        probabilities: npt.NDArray[np.float32],
        images: Images | FloatImages,
        features: npt.NDArray[np.float32] | None = None,
    ) -> Told:
        """Turn probabilities into answers, as `Policy.apply`.

        Args:
            probabilities: float32 (N, K), rows sum to 1.
            images: What was asked, uint8 or float32 in [0, 1], (N, C, H, W).
            features: float32 (N, F) of the victim, if the policy ``reads_features``.
        """
        ...


def reads_features(policy: Policy) -> bool:
    """Return whether a policy must be given the victim's features beside its probabilities."""
    return isinstance(policy, Telling) and policy.reads_features


def tell(
    policy: Policy,
    probabilities: npt.NDArray[np.float32],
    images: Images | FloatImages,
    features: npt.NDArray[np.float32] | None = None,
) -> Told:
    """Answer by any policy; one that treats all images alike marks and flags none. See `Telling.tell`."""
    if isinstance(policy, Telling):
        return policy.tell(probabilities, images, features)
    return Told.plain(policy.apply(probabilities, images))


class Probabilities:
    """All probabilities, as the victim computes them."""

    source: Source = "probabilities"

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Return the probabilities, see `Policy.apply`."""
        return np.array(probabilities, dtype=np.float32)


class TopK:
    """Only the largest probabilities; the others are zero.

    Args:
        k: Probabilities shown; all of them if there are fewer classes. Ties go to the lower class index.
        renormalise: Scale the shown ones to sum to 1.

    Raises:
        ConfigError: ``k`` is below 1.
    """

    source: Source = "probabilities"

    def __init__(self, *, k: int = 5, renormalise: bool = False) -> None:
        if k < 1:
            raise ConfigError(f"k={k} must be at least 1; use the policy `label_only` to hide all probabilities")
        self.k, self.renormalise = k, renormalise

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Keep the ``k`` largest per row, see `Policy.apply`."""
        hidden = np.argsort(-probabilities, axis=1, kind="stable")[:, self.k :]
        answers = np.array(probabilities, dtype=np.float32)
        np.put_along_axis(answers, hidden, np.float32(0), axis=1)
        if self.renormalise:
            # The largest of K probabilities is at least 1/K, so the sum is never zero.
            answers /= answers.sum(axis=1, keepdims=True)
        return answers


class Rounded:
    """Probabilities rounded to a few decimals; rows need not sum to 1 any more.

    Args:
        decimals: Decimals kept.

    Raises:
        ConfigError: ``decimals`` is negative.
    """

    source: Source = "probabilities"

    def __init__(self, *, decimals: int = 2) -> None:
        if decimals < 0:
            raise ConfigError(f"decimals={decimals} must be at least 0; use `label_only` to say even less")
        self.decimals = decimals

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Round each probability, see `Policy.apply`."""
        return np.round(probabilities.astype(np.float64), self.decimals).astype(np.float32)


class LabelOnly:
    """The most probable class and nothing else, as a one-hot row. Ties go to the lower class index."""

    source: Source = "probabilities"

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Return one-hot rows, see `Policy.apply`."""
        answers = np.zeros(probabilities.shape, dtype=np.float32)
        answers[np.arange(len(answers)), probabilities.argmax(axis=1)] = 1
        return answers


class AdditiveNoise:
    """Gaussian noise on each probability, clipped at zero and renormalised.

    The noise is a function of the image and of the owner's secret seed, so it cannot be averaged away by asking again.
    Images that agree after rounding to 8 bits share their noise: neither can it be averaged over invisible changes.

    Args:
        sigma: Standard deviation of the noise, in units of probability.
        seed: The owner's secret; who knows it can subtract the noise.

    Raises:
        ConfigError: ``sigma`` is negative.
    """

    source: Source = "probabilities"

    def __init__(self, *, sigma: float = 0.05, seed: int = 0) -> None:
        if sigma < 0:
            raise ConfigError(f"sigma={sigma} must be at least 0")
        self.sigma, self.seed = sigma, seed

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Add noise to each row, see `Policy.apply`."""
        noise = np.stack([self._noise(image, probabilities.shape[1]) for image in eight_bits(images)])
        noisy = np.clip(probabilities + noise, 0, None)
        total = noisy.sum(axis=1, keepdims=True)
        # Noise may take every probability of a row below zero; such a row is answered as it was.
        answers = np.where(total > 0, noisy / np.where(total > 0, total, 1), probabilities)
        return answers.astype(np.float32)

    def _noise(self, image: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.float64]:
        return image_generator(self.seed, image).normal(0, self.sigma, classes)


def image_generator(seed: int, image: npt.NDArray[np.uint8]) -> np.random.Generator:
    """Return the generator that belongs to a secret seed and an image, uint8 (C, H, W)."""
    key = hashlib.sha256(f"{seed}/{image.shape}/".encode())
    key.update(np.ascontiguousarray(image).data)
    return np.random.default_rng(int.from_bytes(key.digest()[:16], "big"))


def eight_bits(images: Images | FloatImages) -> Images:
    """Return images as uint8: what differs by less than half a step is the same image."""
    if images.dtype == np.uint8:
        return images  # type: ignore[return-value]
    return np.rint(images * np.float32(255)).astype(np.uint8)
