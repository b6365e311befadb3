"""Answer policies: how much of a classifier's probabilities a query API reveals.

Every policy works row by row. The answer to an image never depends on the other images in its batch.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mea_ray.core.types import Answers, FloatImages, Images

Source = Literal["probabilities", "features"]
"""The victim's output that a policy works on: a classifier's probabilities, or an encoder's features."""


class AnswerPolicy(Protocol):
    """Turns the victim's outputs into the answers that clients receive."""

    source: Source
    """The victim's output that ``apply`` takes."""

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Turn the victim's outputs into answers.

        Args:
            probabilities: float32 (N, K), rows sum to 1; for a policy on features, float32 (N, feature_size).
            images: The queried images, uint8 or float32 in [0, 1], (N, C, H, W).

        Returns:
            float32 (N, K), a new array.
        """
        ...


@dataclass(frozen=True)
class Response:
    """Answers to one request, with what only the API's owner knows about them.

    Attributes:
        answers: float32 (N, K).
        marked: Images whose answer carries a watermark, bool (N,).
        flagged: Images that look abnormal to the service, bool (N,).
    """

    answers: Answers
    marked: npt.NDArray[np.bool_]
    flagged: npt.NDArray[np.bool_]

    @classmethod
    def plain(cls, answers: Answers) -> Response:
        """Wrap answers of which none is marked or flagged."""
        none = np.zeros(len(answers), bool)
        return cls(answers, none, none)


@runtime_checkable
class AnnotatingPolicy(Protocol):
    """A policy that treats some images differently, and reports to the owner which ones."""

    source: Source
    reads_features: bool
    """Whether ``respond`` needs the victim's features besides its probabilities."""

    def respond(
        self,
        probabilities: npt.NDArray[np.float32],
        images: Images | FloatImages,
        features: npt.NDArray[np.float32] | None = None,
    ) -> Response:
        """Turn probabilities into annotated answers.

        Args:
            probabilities: float32 (N, K), rows sum to 1.
            images: The queried images, uint8 or float32 in [0, 1], (N, C, H, W).
            features: The victim's features, float32 (N, F), if the policy ``reads_features``.
        """
        ...


@runtime_checkable
class KeyedPolicy(Protocol):
    """A policy whose random numbers are derived from a secret, so that no client can compute them."""

    def use_secret(self, secret: bytes) -> None:
        """Set the secret; until then a policy uses its own, which no other process has.

        Args:
            secret: 32 bytes. All replicas of a service use a hash of the victim's weights: it survives a restart, and
                cannot be computed from the config without the model.
        """
        ...


@runtime_checkable
class FittedPolicy(Protocol):
    """A policy that is fitted on its owner's images before it answers; the service fits it once."""

    fits_on: Literal["features", "probabilities", "pixels"]
    """The data to fit on: the victim's outputs on the images, or the images themselves."""

    def choose(self, clean: Images) -> Images:
        """Choose the images to fit on among the owner's training images, uint8 (N, C, H, W)."""
        ...

    def fit(self, clean: npt.NDArray[np.float32]) -> None:
        """Fit on one vector per chosen image, float32 (N, D), as set by ``fits_on``."""
        ...


def reads_features(policy: AnswerPolicy) -> bool:
    """Return whether a policy needs the victim's features besides its probabilities."""
    return isinstance(policy, AnnotatingPolicy) and policy.reads_features


def respond(
    policy: AnswerPolicy,
    probabilities: npt.NDArray[np.float32],
    images: Images | FloatImages,
    features: npt.NDArray[np.float32] | None = None,
) -> Response:
    """Apply any policy; a plain one does not mark or flag answers. See `AnnotatingPolicy.respond`."""
    if isinstance(policy, AnnotatingPolicy):
        return policy.respond(probabilities, images, features)
    return Response.plain(policy.apply(probabilities, images))


class Probabilities:
    """All probabilities, as the victim computes them.

    Choose it first: the setting of most papers.
    """

    source: Source = "probabilities"

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Return the probabilities, see `AnswerPolicy.apply`."""
        return np.array(probabilities, dtype=np.float32)


class TopK:
    """Only the largest probabilities; the others are zero.

    Choose it for an API that returns only the most probable classes.

    Args:
        k: Number of probabilities revealed; all of them if there are fewer classes. Ties go to the lower class index.
        renormalise: Scale the revealed probabilities to sum to 1.
    """

    source: Source = "probabilities"

    def __init__(self, *, k: Annotated[int, Field(ge=1)] = 5, renormalise: bool = False) -> None:
        self.k, self.renormalise = k, renormalise

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Keep the ``k`` largest probabilities of each row, see `AnswerPolicy.apply`."""
        hidden = np.argsort(-probabilities, axis=1, kind="stable")[:, self.k :]
        answers = np.array(probabilities, dtype=np.float32)
        np.put_along_axis(answers, hidden, np.float32(0), axis=1)
        if self.renormalise:
            # The largest of K probabilities is at least 1/K, so the sum is never zero.
            answers /= answers.sum(axis=1, keepdims=True)
        return answers


class Rounded:
    """Probabilities rounded to a few decimals; rows may no longer sum to 1.

    Choose it for an API that rounds its answers.

    Args:
        decimals: Number of decimals.
    """

    source: Source = "probabilities"

    def __init__(self, *, decimals: Annotated[int, Field(ge=0)] = 2) -> None:
        self.decimals = decimals

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Round each probability, see `AnswerPolicy.apply`."""
        return np.round(probabilities.astype(np.float64), self.decimals).astype(np.float32)


class LabelOnly:
    """The most probable class only, as a one-hot row. Ties go to the lower class index.

    Choose it for an API that returns the class and nothing else.
    """

    source: Source = "probabilities"

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Return one-hot rows, see `AnswerPolicy.apply`."""
        answers = np.zeros(probabilities.shape, dtype=np.float32)
        answers[np.arange(len(answers)), probabilities.argmax(axis=1)] = 1
        return answers


class AdditiveNoise:
    """Gaussian noise on each probability, clipped at zero and renormalised.

    Choose it for an API that perturbs its answers.

    The noise is a function of the image and of a secret, so repeating the query does not average it out. Images that
    are equal after rounding to 8 bits share their noise, so invisible changes do not average it out either. The secret
    follows from the victim's weights (`KeyedPolicy`).

    Args:
        sigma: Standard deviation of the noise, in units of probability.
        seed: Seed of the noise. It is not secret.
    """

    version: ClassVar[int] = 2  # 2: the noise does not follow from the seed alone
    source: Source = "probabilities"

    def __init__(self, *, sigma: Annotated[float, Field(ge=0)] = 0.05, seed: int = 0) -> None:
        self.sigma, self.seed = sigma, seed
        self._secret = secrets.token_bytes(32)

    def use_secret(self, secret: bytes) -> None:
        """Derive the noise from a secret, see `KeyedPolicy.use_secret`."""
        self._secret = secret

    def apply(self, probabilities: npt.NDArray[np.float32], images: Images | FloatImages) -> Answers:
        """Add noise to each row, see `AnswerPolicy.apply`."""
        noise = np.stack([self._noise(image, probabilities.shape[1]) for image in to_uint8(images)])
        noisy = np.clip(probabilities + noise, 0, None)
        total = noisy.sum(axis=1, keepdims=True)
        # The noise can make a whole row negative; such a row is answered without noise.
        answers = np.where(total > 0, noisy / np.where(total > 0, total, 1), probabilities)
        return answers.astype(np.float32)

    def _noise(self, image: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.float64]:
        return image_generator(self._secret, self.seed, image).normal(0, self.sigma, classes)


def image_generator(secret: bytes, seed: int, image: npt.NDArray[np.uint8]) -> np.random.Generator:
    """Return the random generator of a secret, a number and an image, uint8 (C, H, W)."""
    key = hmac.new(secret, f"{seed}/{image.shape}/".encode(), hashlib.sha256)
    key.update(np.ascontiguousarray(image).tobytes())
    return np.random.default_rng(int.from_bytes(key.digest(), "big"))


def pixel_vectors(images: Images | FloatImages) -> npt.NDArray[np.float32]:
    """Return images as vectors: float32 (N, C * H * W), in [0, 1]."""
    flat: npt.NDArray[np.float32] = to_uint8(images).reshape(len(images), -1).astype(np.float32) / np.float32(255)
    return flat


def to_uint8(images: Images | FloatImages) -> Images:
    """Return images as uint8. Float images that differ by less than half a level become equal."""
    if images.dtype == np.uint8:
        return images.astype(np.uint8, copy=False)
    rounded: Images = np.rint(images * np.float32(255)).astype(np.uint8)
    return rounded
