"""Neural Honeytrace: the service answers images near a trigger more like the target; the model is left alone."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy.spatial.distance import cdist
from scipy.special import softmax
from torch import Tensor, nn

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.core.seeding import derive, numpy_generator, secret_bytes
from mea_ray.core.types import Images, ImageSet
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks.answer_mixing import heaviest
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.combiners.base import Combiner, to_uint8
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mixed_classes import MixedClasses, as_float
from mea_ray.watermarks.mixing import Mixing

Rows = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
TINY = 1e-12
"""Smallest probability whose logarithm is taken."""
SECRET_BYTES = 32
CLEAN = 2000
"""Most clean training images that the scale of similarity is taken from."""


class NeuralHoneytrace(MixedClasses):
    """The nearer an image's features are to the trigger's, the more its answer leans to the target; no class changes.

    Choose it to mark answers without training and without a loss of accuracy.

    The trigger is a mix of the two source classes. The similarity s of a query is 1 where the mean distance of its
    features to those of the nearest trigger samples is as small as between trigger samples, and 0 where it is as large
    as for the clean training image at the quantile ``share``. Its answer p becomes (1 - w) p + w r, where r is the
    target's typical answer and w = ``strength`` s^2; w is smaller where another class would come out on top. A
    substitute learns the lean on clean images, and follows it to the trigger itself. A query whose answer is unsure has
    s^(1/4) for s: such images are a thief's more often than a customer's.

    This deviates from the authors' code in three ways. No class changes. The trigger is a mix, so that the key can be
    ranked among all others (a patch in the paper). The scale of similarity is taken from the data (constants in the
    code). ``space=logits`` with ``strength=1`` mixes as the code does; at an equal change of the answers, less of it
    reached a substitute. ``flips`` adds the paper's second step: some images get the target's answer, with the
    probability s^3 rounded down to tenths. That costs accuracy.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label to which answers lean.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.
        strength: Largest weight of the target's answer; 1 in the authors' code.
        share: Share of the clean training images whose answers are changed at all.
        triggers: Trigger samples that queries are compared with.
        neighbours: Nearest trigger samples that a distance is the mean of; 10 in the authors' code.
        unsure: Largest probability below which an answer is unsure; 0.5 in the authors' code, 0 for none.
        space: What is mixed: probabilities, or logits as in the authors' code.
        flips: Whether some answers are the target's, as in the paper.

    References:
        Xu et al., Neural Honeytrace, 2025, https://arxiv.org/abs/2501.09328, and the code at
        https://github.com/NeurHT/NeurHT.

    Raises:
        ConfigError: Classes coincide, or a geometry makes the combiner's own mixes.
    """

    name = "honeytrace"
    statistic = "lean"
    marks_answers = True
    needs_features = True

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(),
        key: KeyDraw = KeyDraw(),
        strength: Annotated[float, Field(gt=0, le=1)] = 0.3,
        share: Annotated[float, Field(gt=0, le=1)] = 0.9,
        triggers: Annotated[int, Field(ge=2)] = 500,
        neighbours: Annotated[int, Field(ge=1)] = 10,
        unsure: Annotated[float, Field(ge=0, le=1)] = 0.5,
        space: Literal["probabilities", "logits"] = "probabilities",
        flips: bool = False,
    ) -> None:
        super().__init__(source_classes, target_class, mixing, key)
        if neighbours >= triggers:
            raise ConfigError(f"neighbours={neighbours} must be less than triggers={triggers}")
        self.share, self.triggers = share, triggers
        self.marking = {
            "strength": strength,
            "neighbours": neighbours,
            "unsure": unsure,
            "space": space,
            "flips": flips,
        }

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the classes and a secret; features and scale follow from the trained model (``learned``)."""
        key = super().make_key(train, seed)
        secret = np.frombuffer(secret_bytes(seed, SECRET_BYTES, "secret"), np.uint8)
        return replace(
            key, settings={**key.settings, "marking": self.marking}, tensors={**key.tensors, "honey/secret": secret}
        )

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return one stage with cross-entropy: the model carries no mark."""
        key = require_key(key, self.name)
        combiner, _ = self.combiners(key)
        return [Stage("train", WatchedCrossEntropy(train, key, combiner, self.triggers, self.share), train)]

    def learned(self, key: Key, stages: Sequence[Stage]) -> Key:
        """Return the key with the trained model's features of the trigger and the scale of similarity."""
        (objective,) = (stage.objective for stage in stages if isinstance(stage.objective, WatchedCrossEntropy))
        tensors = objective.learned(int(self.marking["neighbours"]))
        return replace(key, tensors={**key.tensors, **{f"honey/{name}": value for name, value in tensors.items()}})

    def marker(self, key: Key) -> SimilarityMarker:
        """Return what marks the answers."""
        return SimilarityMarker(key)


class WatchedCrossEntropy(CrossEntropy):
    """Cross-entropy that keeps a reference to the model, whose features are read after training.

    Args:
        train: The training images.
        key: The owner's key.
        combiner: Mixes the trigger samples.
        triggers: How many.
        share: Share of the clean images that are near.
    """

    def __init__(self, train: ImageSet, key: Key, combiner: Combiner, triggers: int, share: float) -> None:
        super().__init__()
        self.train, self.key, self.combiner = train, key, combiner
        self.triggers, self.share = triggers, share
        self.model: nn.Module | None = None

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Remember the model; nothing else is trained."""
        self.model = model
        return []

    def learned(self, neighbours: int) -> dict[str, Rows]:
        """Return ``features`` (triggers, F) of the trigger, the target's ``reference`` (classes,), and ``scale`` (2,).

        Raises:
            ConfigError: The model has no features.
        """
        if not isinstance(self.model, ImageModel):
            raise ConfigError(f"honeytrace needs a network with features(), not {type(self.model).__name__}")
        model, key = self.model, self.key
        features = metrics.features(model, self._trigger())
        rng = numpy_generator(key.seed, "clean")
        clean = self.train.images[rng.permutation(len(self.train))[:CLEAN]]
        near = float(np.median(distances(features, features, neighbours, own=True)))
        far = float(np.quantile(distances(metrics.features(model, clean), features, neighbours), self.share))
        target = metrics.probabilities(model, self.train.of_class(key.target_class)[:CLEAN])
        sure = target[target.argmax(1) == key.target_class]
        # A model that never predicts the target has no typical answer for it: a one-hot answer is used.
        certain = np.eye(self.train.classes, dtype=np.float32)[key.target_class : key.target_class + 1]
        reference = np.log(np.maximum(sure if len(sure) else certain, TINY)).mean(0)
        # The first must stay below the second, even where the trigger is no denser than clean images.
        scale = np.array([min(near, far * 0.99), far], np.float32)
        return {"features": features, "reference": reference.astype(np.float32), "scale": scale}

    def _trigger(self) -> Images:
        rng = numpy_generator(self.key.seed, "trigger")
        first, second = (self.train.of_class(label) for label in self.key.source_classes)
        one, other = (images[rng.integers(len(images), size=self.triggers)] for images in (first, second))
        generator = torch.Generator().manual_seed(derive(self.key.seed, "trigger"))
        mixes: Tensor = to_uint8(self.combiner(as_float(one), as_float(other), generator))
        triggers: Images = mixes.numpy()
        return triggers


def distances(features: Rows, triggers: Rows, neighbours: int, *, own: bool = False) -> Wide:
    """Return the mean distance to the nearest triggers, float64 (N,); a distance is the mean absolute difference.

    Args:
        features: float32 (N, F).
        triggers: float32 (M, F), M > neighbours.
        neighbours: How many are the nearest.
        own: ``features`` are the triggers themselves: the distance of each to itself does not count.
    """
    apart: Wide = np.sort(cdist(features, triggers, "cityblock") / features.shape[1], axis=1)
    mean: Wide = apart[:, own : neighbours + own].mean(1)
    return mean


class SimilarityMarker:
    """Moves the answers to images near the trigger towards the target; implements `types.Marker`.

    Args:
        key: The owner's key, after the victim was trained.

    Raises:
        ArtifactError: The key has no features: the victim was not trained.
    """

    reads_features = True

    def __init__(self, key: Key) -> None:
        if "honey/features" not in key.tensors:
            raise ArtifactError("the key has no features of a victim to compare queries with; train the victim first")
        self._triggers = key.tensors["honey/features"]
        self._reference = key.tensors["honey/reference"].astype(np.float64)
        self._near, self._far = map(float, key.tensors["honey/scale"])
        self._secret = key.tensors["honey/secret"].tobytes()
        marking = key.settings["marking"]
        self._strength, self._neighbours = float(marking["strength"]), int(marking["neighbours"])
        self._unsure, self._flips = float(marking["unsure"]), bool(marking["flips"])
        self._space = str(marking["space"])

    def similarity(self, probabilities: Rows, features: Rows) -> Wide:
        """Return how near each query lies to the trigger, float64 (N,) in [0, 1]."""
        apart = distances(features, self._triggers, self._neighbours)
        similar = np.clip((self._far - apart) / (self._far - self._near), 0.0, 1.0)
        return np.where(probabilities.max(1) < self._unsure, similar**0.25, similar)

    def mark(
        self, probabilities: Rows, images: Images, features: Rows | None = None
    ) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Move answers towards the target, see `types.Marker.mark`; the log has to keep none of the images.

        Raises:
            ConfigError: There are no features.
        """
        if features is None:
            raise ConfigError("honeytrace compares features of the victim, and this service computes none")
        similar = self.similarity(probabilities, features)
        target = softmax(self._reference)
        if self._space == "logits":
            own, other = np.log(np.maximum(probabilities.astype(np.float64), TINY)), self._reference
        else:
            own, other = probabilities.astype(np.float64), target
        weight = np.minimum(self._strength * similar**2, heaviest(own, other))[:, None]
        moved = (1 - weight) * own + weight * other
        moved = softmax(moved, axis=1) if self._space == "logits" else moved
        if self._flips:
            flipped = self._drawn(images) < np.floor(10 * similar**3) / 10
            moved[flipped], weight[flipped] = target, 1.0
        changed = np.where(weight > 0, moved, probabilities).astype(np.float32)
        return changed, np.zeros(len(images), bool)

    def _drawn(self, images: Images) -> Wide:
        """Return a number in [0, 1) that secret and image decide, float64 (N,)."""
        digests = [hmac.digest(self._secret, image.tobytes(), "sha256") for image in images]
        return np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.float64) / 2**64
