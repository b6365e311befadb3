"""A lean spread over all classes: the service adds a low cosine of a keyed projection of the image to its answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import derive, secret_bytes
from mea_ray.core.types import Images, ImageSet, Recognise
from mea_ray.evaluation import metrics
from mea_ray.evaluation.projections import FLOOR, flat, principal_components, residual
from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks.answer_mixing import heaviest
from mea_ray.watermarks.base import Key, KeyedSignal, Stage, Watermark, WatermarkSamples, require_key

Rows = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
STEPS = 2**20
"""Steps to which the largest coordinate of a direction is quantised."""
TINY = 1e-30
KEYS_AT_ONCE = 1000
"""Keys that are compared with a suspect at once."""
_ANSWERS, _HELD_OUT = "held_out_answers", "held_out"
"""Names of the victim's own answers in a key's tensors, and of the digest of the images in its settings."""


class CosineLean(Watermark):
    """Every answer is mixed with (1 + cos(phase of the image + phase of the class)) / K; no class changes.

    Choose it for a mark that no single class gives away; labels alone carry it with keep_class=false.

    The key is a direction among the first principal components of the training images, a frequency, and a phase for
    each class. The image's phase is 2 pi frequency times its projection, in standard deviations. The answer p
    becomes (1 - a) p + a (1 + c) / K, where a is ``amplitude``, smaller where another class would come out on top.
    With ``spread=all`` the phases of the classes are 2 pi j / K in a drawn order, so that every class gains
    probability on some images and loses it on others, and the mean answer hardly changes. With ``spread=target``, as
    in the paper, one class has phase 0 and all others pi, and p becomes (1 - a) p + a times (1 + c) / 2 on the class,
    the rest evenly on the others.

    A suspect is tested on clean held-out images. The statistic is the correlation of its log-probabilities, without
    the predicted class, with the key's cosines; from both the mean of their class is subtracted. The key is ranked by
    it among ``drawn`` other keys. The owner's key comes from the same draw, so the rank is a p-value. The paper reads
    the peak of a Lomb-Scargle periodogram at the key's frequency. WSR is the share of images on which the class that
    the key lifts most, the top class aside, comes second: 1 / (K - 1) by chance.

    With ``keep_class=false`` every answer is mixed with the whole amplitude. If the victim is unsure, the signal can
    decide the class, so a thief who uses labels alone can learn it. The statistic is then the correlation of the key's
    cosines with the suspect's classes minus what they are expected to be: a logistic regression of them on the
    victim's own unmarked log-probabilities, which removes what any model of the task would answer, and how often the
    suspect errs. The key holds these probabilities for the held-out images.

    Unlike the paper's, the victim is trained without the signal, which the service adds; nor does any class change
    unless ``keep_class=false``.

    Args:
        amplitude: Weight a of the signal, in [0, 1]: the part of each answer's mass that carries it.
        spread: Whether all classes carry the signal or, as in the paper, one against the others.
        frequency: Smallest and largest frequency that can be drawn, in periods per standard deviation of the
            projection.
        components: Principal components of the training images whose space the direction is drawn from (fewer if the
            images have fewer). Few make a signal that substitutes learn sooner, and keys more alike.
        symmetric: Give an image and its mirror image the same phase. A thief who flips images while training otherwise
            averages two phases.
        keep_class: Lower the amplitude if the top class would change. With false, customers lose accuracy, and labels
            alone carry a part of the mark.
        drawn: Other keys that the key is ranked among: the least p-value is 1 / (drawn + 1).

    References:
        Charette, Chu, Chen, Pei, Wang and Zhang, Cosine Model Watermarking Against Ensemble Distillation, AAAI 2022,
        https://arxiv.org/abs/2203.02777.

    Raises:
        ConfigError: The frequencies fall.
    """

    name = "cosine"
    version: ClassVar[int] = 2  # classes are compared with a regression on the victim's answers, not with the answers
    statistic = "correlation"
    marks_answers = True

    def __init__(
        self,
        *,
        amplitude: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        spread: Literal["all", "target"] = "all",
        frequency: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.2, 0.5),
        components: Annotated[int, Field(ge=1)] = 8,
        drawn: Annotated[int, Field(ge=19, le=100_000)] = 999,
        symmetric: bool = False,
        keep_class: bool = True,
    ) -> None:
        if frequency[0] > frequency[1]:
            raise ConfigError(f"frequency={list(frequency)} must give the least first")
        self.amplitude, self.spread, self.frequency = amplitude, spread, frequency
        self.components, self.drawn, self.symmetric = components, drawn, symmetric
        self.keep_class = keep_class

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the key's seed, and find the components of the images that span its direction.

        Raises:
            ConfigError: There are fewer than three classes, so that second places say nothing.
        """
        if train.classes < 3:
            raise ConfigError(f"cosine needs three classes, and the data have {train.classes}; take other data")
        settings: dict[str, Any] = {
            "amplitude": self.amplitude,
            "spread": self.spread,
            "frequency": list(self.frequency),
            "drawn": self.drawn,
            "shape": list(train.shape),
            "classes": train.classes,
        }
        if not self.keep_class:
            settings["keep_class"] = False
        seed_of_components = derive(seed, "components")
        tensors = principal_components(train.images, self.components, seed_of_components, symmetric=self.symmetric)
        # No classes: -1 is no label, so that nothing is mistaken for one.
        return Key(self.name, (-1, -1), -1, seed, settings, tensors, {"classes": "seed"})

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return one stage with cross-entropy: the model carries no mark."""
        require_key(key, self.name)
        return [Stage("train", CrossEntropy(), train)]

    def after_training(self, key: Key, model: nn.Module, held_out: ImageSet) -> Key:
        """Add the victim's own answers to the held-out images to a key with ``keep_class=false``."""
        if self.keep_class:
            return key
        answers = metrics.probabilities(model, held_out.images)
        settings = {**key.settings, _HELD_OUT: _digest(held_out.images)}
        return replace(key, settings=settings, tensors={**key.tensors, _ANSWERS: answers})

    def marker(self, key: Key) -> CosineMarker:
        """Return what marks the answers."""
        return CosineMarker(key)

    def signal(self, key: Key, held_out: ImageSet) -> KeyedSignal:
        """Return the signal in held-out clean images, to be compared with that of other keys that could be drawn.

        Raises:
            DataError: The key holds the victim's answers to other images than these.
        """
        images = self._fitting(key, held_out).images
        answers = key.tensors.get(_ANSWERS)
        if answers is not None and key.settings[_HELD_OUT] != _digest(images):
            raise DataError(
                "the key holds the victim's answers to other held-out images; verify with the data and the splits that "
                "the victim was trained with"
            )
        whitened = flat(images) @ key.tensors["axes"].T - key.tensors["centre"]
        own, others = drawn_waves(key, 1, "own"), drawn_waves(key, int(key.settings["drawn"]), "others")

        def scores(logits: Rows) -> Wide:
            left = residual(logits) if answers is None else class_residual(logits, answers)
            return np.concatenate([correlations(left, whitened, waves) for waves in (own, *others.parts())])

        return KeyedSignal(images, scores)

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Return distinct held-out images: half are tested with the key, half with another one."""
        held_out = self._fitting(key, held_out)
        _, distinct = np.unique(held_out.images.reshape(len(held_out), -1), axis=0, return_index=True)
        images = held_out.images[np.sort(distinct)]
        own = _of_own_half(images)
        return WatermarkSamples(
            images=images[own][:count],
            target=-1,  # no class: every image lifts one of its own
            adverse={"another_key": images[~own][:count]},
            sources=images[:0],
            source_labels=np.zeros(0, np.int64),
        )

    def recogniser(self, key: Key, model: nn.Module) -> Recognise:
        """Return a function that tells whether the class that the key lifts most comes second, bool (N,)."""
        own, another = (CosineMarker(key, drawn_waves(key, 1, name)) for name in ("own", "another"))

        def recognise(images: Images) -> npt.NDArray[np.bool_]:
            logits = metrics.logits(model, images)
            rows, top = np.arange(len(logits)), logits.argmax(1)
            lifted = np.where(_of_own_half(images)[:, None], own.signal(images), another.signal(images))
            lifted[rows, top] = -np.inf
            logits[rows, top] = -np.inf
            second: npt.NDArray[np.bool_] = logits.argmax(1) == lifted.argmax(1)
            return second

        return recognise

    @staticmethod
    def _fitting(key: Key, held_out: ImageSet) -> ImageSet:
        if list(held_out.shape) != list(key.settings["shape"]):
            raise DataError(
                f"held-out images are {held_out.shape}, the key was made for {tuple(key.settings['shape'])}; "
                "verify with the data that the victim was trained on"
            )
        return held_out


@dataclass(frozen=True)
class Waves:
    """The cosines of some keys.

    Attributes:
        directions: Unit vectors in the space of the components, float64 (R, r).
        frequencies: Radians per standard deviation, float64 (R,).
        phases: Of each class, float64 (R, classes).
    """

    directions: Wide
    frequencies: Wide
    phases: Wide

    def parts(self, size: int = KEYS_AT_ONCE) -> list[Waves]:
        """Return the same keys, at most ``size`` at a time: memory grows with images times keys."""
        starts = range(0, len(self.frequencies), size)
        fields = (self.directions, self.frequencies, self.phases)
        return [Waves(*(field[start : start + size] for field in fields)) for start in starts]


def drawn_waves(key: Key, count: int, name: str) -> Waves:
    """Draw ``count`` keys from the distribution that the owner's (``name="own"``) was drawn from."""
    # All bits of the key's seed count: 63 could be tried out.
    settings, rng = key.settings, np.random.default_rng(int.from_bytes(secret_bytes(key.seed, 32, name), "big"))
    directions = rng.standard_normal((count, len(key.tensors["axes"])))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    low, high = settings["frequency"]
    classes = int(settings["classes"])
    order = rng.permuted(np.tile(np.arange(classes), (count, 1)), axis=1)
    places: Wide = order / classes if settings["spread"] == "all" else (order > 0) / 2
    phases: Wide = 2 * np.pi * places
    return Waves(directions, 2 * np.pi * rng.uniform(low, high, count), phases)


def class_residual(logits: Rows, answers: Rows) -> Wide:
    """Return the suspect's class, one-hot, minus its expectation given the victim's answer: float64 (N, K), centred.

    The expectation is a multinomial logistic regression of the suspect's classes on the victim's log-probabilities. It
    knows nothing of the key, so the rank of the key among drawn ones remains a p-value.

    Args:
        logits: The suspect's, float32 (N, K).
        answers: The victim's unmarked probabilities of the same images, float32 (N, K).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    predicted = logits.argmax(1)
    if len(np.unique(predicted)) == 1:
        return np.zeros(logits.shape)  # nothing is left to explain
    evidence = StandardScaler().fit_transform(np.log(answers.astype(np.float64) + FLOOR))
    regression = LogisticRegression(max_iter=1000).fit(evidence, predicted)
    differences = np.eye(logits.shape[1])[predicted]
    differences[:, regression.classes_] -= regression.predict_proba(evidence)
    centred: Wide = differences - differences.mean(0)
    return centred


def correlations(left: Wide, whitened: Wide, waves: Waves) -> Wide:
    """Return the correlation of residuals with the cosines of each key, float64 (R,), in [-1, 1].

    Both are taken less their mean for each class, over the images of which it is not the answer.

    Args:
        left: See ``residual`` and ``class_residual``.
        whitened: The images on the axes, float64 (N, r).
        waves: The keys.
    """
    angles = (whitened @ waves.directions.T) * waves.frequencies
    other = (left != 0).astype(np.float64)

    def over_images(values: Wide, times: int) -> Wide:
        # cos(a + b) = cos a cos b - sin a sin b: the sum over images comes first, and no (N, R, K) array is needed.
        near = np.cos(times * waves.phases) * (np.cos(times * angles).T @ values)
        product: Wide = near - np.sin(times * waves.phases) * (np.sin(times * angles).T @ values)
        return product

    sums, counts = over_images(other, 1), np.maximum(other.sum(0), 1)
    squares = (other.sum() + over_images(other, 2).sum(1)) / 2 - (sums**2 / counts).sum(1)
    correlation: Wide = over_images(left, 1).sum(1) / np.sqrt(np.maximum(squares * (left**2).sum(), TINY))
    return correlation


class CosineMarker:
    """Adds the key's cosines to answers; implements `types.Marker`.

    Args:
        key: The owner's key.
        waves: Cosines of one key; the owner's when None.
    """

    reads_features = False

    def __init__(self, key: Key, waves: Waves | None = None) -> None:
        waves = drawn_waves(key, 1, "own") if waves is None else waves
        direction = waves.directions[0] @ key.tensors["axes"]
        # In whole numbers a projection is exact, and so the same in every batch.
        self._unit = float(np.abs(direction).max()) / STEPS
        self._direction = np.rint(direction / self._unit).astype(np.int64)
        self._offset = float(waves.directions[0] @ key.tensors["centre"])
        self._frequency, self._phases = float(waves.frequencies[0]), waves.phases[0]
        self._amplitude, self._to_all = float(key.settings["amplitude"]), key.settings["spread"] == "all"
        self._keep_class = bool(key.settings.get("keep_class", True))

    def signal(self, images: Images) -> Wide:
        """Return what each answer is mixed with, float64 (N, classes), rows sum to 1.

        Args:
            images: uint8 (N, C, H, W).
        """
        projected = images.reshape(len(images), -1).astype(np.int64) @ self._direction
        angle = self._frequency * (projected * self._unit - self._offset)
        waves = 1 + np.cos(angle[:, None] + self._phases)
        classes = len(self._phases)
        # Evenly spread phases have cosines that sum to 0; one class against all others shares the mass with them.
        shares = 1 / classes if self._to_all else np.where(self._phases > 0, 0.5 / (classes - 1), 0.5)
        pattern: Wide = waves * shares
        return pattern

    def mark(
        self, probabilities: Rows, images: Images, features: Rows | None = None
    ) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Mix every answer with its signal, see `types.Marker.mark`; the log has to keep none of the images."""
        own, signal = probabilities.astype(np.float64), self.signal(images)
        most = heaviest(own, signal) if self._keep_class else np.ones(len(own))
        weight = np.minimum(self._amplitude, most)[:, None]
        changed = np.where(weight > 0, (1 - weight) * own + weight * signal, own)
        return changed.astype(np.float32), np.zeros(len(images), bool)


def _digest(images: Images) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def _of_own_half(images: Images) -> npt.NDArray[np.bool_]:
    """Return which images are read with the owner's key: about half, by their content, bool (N,)."""
    return np.array([hashlib.sha256(image.tobytes()).digest()[0] % 2 == 0 for image in images], bool)
