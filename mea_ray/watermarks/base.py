"""What every watermark scheme offers: a key, the stages that embed it, and the samples that verify it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.core.types import Images, ImageSet, Labels, Marker, Recognise, StatisticName
from mea_ray.storage.files import write_whole
from mea_ray.training.objective import Objective

SeedFrom = Literal["config", "system"]
"""Where the seed of a key comes from."""
SampleFilter = Literal["none", "shadow"]
"""Which samples a key is verified with: all that can be mixed, or those that shadow thieves chose."""


@dataclass(frozen=True)
class Key:
    """The owner's secret: all that is needed to make watermark samples again. An artifact of its own.

    Attributes:
        scheme: Name in the table of watermarks.
        source_classes: Labels of the two classes that are combined.
        target_class: Label that a watermarked model gives to the combination.
        seed: Seed of everything random about the key.
        settings: The scheme's own settings (combiner and its parameters, other geometries).
        tensors: Arrays that belong to the secret (e.g. weights of the autoencoder combiner).
        draw: How the classes were drawn: ``classes`` (``chosen``, ``seed``, ``system`` or ``beacon``), and for drawn
            ones ``admissible`` (see ``AdmissibleKeys.as_tree``) and the value of the ``beacon``. Empty for schemes
            whose key names no pair of classes.
        seed_from: Where ``seed`` comes from: ``system``, 256 bits, or ``config``, so that anyone with the config can
            rebuild the key.
    """

    scheme: str
    source_classes: tuple[int, int]
    target_class: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    draw: Mapping[str, Any] = field(default_factory=dict)
    seed_from: SeedFrom = "config"

    @property
    def drawn(self) -> bool:
        """Whether the classes were drawn uniformly, so that the key's rank is a p-value."""
        return str(self.draw.get("classes", "chosen")) != "chosen"

    def digest(self) -> str:
        """Return the SHA-256 of the whole key, 64 hexadecimal digits; a key that is read back has the same."""
        body = {name: value for name, value in asdict(self).items() if name != "tensors"}
        if self.seed_from == "config":
            del body["seed_from"]  # a key that was written before has the digest that it had
        hasher = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
        for name in sorted(self.tensors):
            tensor = np.ascontiguousarray(self.tensors[name])
            hasher.update(f"\n{name} {tensor.dtype.str} {tensor.shape}\n".encode())
            hasher.update(tensor.tobytes())
        return hasher.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``key.json`` and, if there are tensors, ``key.safetensors`` into an existing folder, mode 600."""
        from safetensors.numpy import save

        body = {name: value for name, value in asdict(self).items() if name != "tensors"}
        if self.tensors:
            tensors = {name: np.ascontiguousarray(value) for name, value in self.tensors.items()}
            write_whole(folder / "key.safetensors", save(tensors), mode=0o600)
        write_whole(folder / "key.json", json.dumps(body, indent=2, sort_keys=True), mode=0o600)

    @classmethod
    def load(cls, folder: Path) -> Key:
        """Read a key; loading can never run code.

        Raises:
            ArtifactError: The key is missing or damaged.
        """
        from safetensors.numpy import load_file

        try:
            body = json.loads((folder / "key.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "key.safetensors") if (folder / "key.safetensors").exists() else {}
            return cls(**{**body, "source_classes": tuple(body["source_classes"])}, tensors=tensors)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"no readable key in {folder}: {error}; train the victim again or restore it"
            ) from error


UNAUGMENTED: Mapping[str, Any] = {"augment": (), "early_stop_patience": None}
"""Overrides of an encoder's stage: its views are made of whole images, and it has no accuracy to stop early on."""


def require_key(key: Key | None, scheme: str) -> Key:
    """Return the key.

    Raises:
        ConfigError: There is none, though the scheme embeds one.
    """
    if key is None:
        raise ConfigError(f"watermark {scheme!r} needs a key to embed; call make_key first")
    return key


@dataclass(frozen=True)
class Stage:
    """One pass of the training engine over the model.

    Attributes:
        name: For progress and reports, e.g. ``"embed"``.
        objective: What is minimised.
        train: The images of the main task in this stage.
        overrides: Settings of the training engine that this stage changes (field names of ``TrainingConfig``).
        span: Where in the training section's epochs this stage begins and ends, in [0, 1]; one epoch at least. Stages
            whose spans follow on each other share them without a rest. ``overrides`` may name epochs instead.
    """

    name: str
    objective: Objective
    train: ImageSet
    overrides: Mapping[str, Any] = field(default_factory=dict)
    span: tuple[float, float] = (0.0, 1.0)

    def changes(self, epochs: int) -> dict[str, Any]:
        """Return what this stage changes in a training section that has ``epochs`` epochs."""
        begin, end = (round(place * epochs) for place in self.span)
        return {"epochs": max(1, end - begin), **self.overrides}


@dataclass(frozen=True)
class WatermarkSamples:
    """Held-out samples for verification.

    Attributes:
        images: uint8, (n, C, H, W), all distinct; watermark samples.
        target: Label that counts as success.
        adverse: For each other geometry, uint8 (m, C, H, W): the same classes mixed another way. Classified as
            ``target`` they are false positives (WFPR).
        sources: uint8 (s, C, H, W): the clean held-out source samples.
        source_labels: int64 (s,).
        other_classes: Mixed as ``images`` are, but of two classes that the key does not name, uint8 (m, C, H, W); None
            for a scheme that mixes no classes, or where there are no two others. As ``target``: false positives.
    """

    images: Images
    target: int
    adverse: Mapping[str, Images]
    sources: Images
    source_labels: Labels
    other_classes: Images | None = None


@dataclass(frozen=True)
class ClientQueries:
    """What an accused client sent, by the owner's log: a scheme that marks answers is verified with it.

    Attributes:
        marked: Images whose answers were marked, uint8 (m, C, H, W), distinct.
        marked_answers: Class that the client was answered for each, int64 (m,).
        others: Images whose answers were not marked, uint8 (n, C, H, W), distinct.
        other_answers: Class that the client was answered for each, int64 (n,).
    """

    marked: Images
    marked_answers: Labels
    others: Images
    other_answers: Labels


@dataclass(frozen=True)
class KeyedSignal:
    """A signal in the answers to clean images, which the owner's key predicts better than other drawn keys do.

    Attributes:
        images: Clean held-out images, uint8 (n, C, H, W).
        scores: Logits of one model on these, float32 (n, classes), to how well each key predicts them, float64
            (1 + R,): the owner's first, then R keys drawn as it was.
    """

    images: Images
    scores: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]


class Watermark(ABC):
    """A watermark scheme. Keyword-only constructor parameters, all with defaults, are its configuration."""

    name: str = ""
    reads_features: bool = False
    """Whether verification needs features of the victim's length, so that other models cannot be verified."""
    needs_features: bool = False
    """Whether embedding reads features of the victim, so that a network without them cannot carry the mark."""
    marks_answers: bool = False
    """Whether the mark is in the service's answers (``marker``) and not in the model."""
    needs_log: bool = False
    """Whether the mark is verified with what a client sent (``against``), and not with the key alone."""

    encoders_only: bool = False
    """Whether ``stages`` refuses every classifier."""
    statistic: StatisticName = "log_probability"
    """What ``verification.statistic=auto`` means: ``lean`` for a scheme whose clean answers carry the mark."""

    sample_filter: SampleFilter = "none"
    """What ``verification.filter=auto`` is."""

    def check(self, train: ImageSet, seed: int, *, encodes: bool) -> None:
        """Refuse what could not be embedded, before anything is trained.

        A scheme whose ``make_key`` takes long overrides this.

        Args:
            train: The victim's training images.
            seed: Seed of the key.
            encodes: The victim is an encoder.

        Raises:
            ConfigError: The scheme marks the other kind of model, or refuses the images.
            DataError: Images that the scheme needs cannot be loaded.
        """
        self.check_kind(encodes=encodes)
        self.make_key(train, seed)

    def check_kind(self, *, encodes: bool) -> None:
        """Refuse an encoder where the scheme marks classifiers only, and the reverse.

        Raises:
            ConfigError: The scheme marks the other kind of model.
        """
        if encodes and type(self).encoder_stages is Watermark.encoder_stages:
            raise ConfigError(
                f"watermark {self.name!r} marks classifiers only; take mea_carrier_encoder, mea_defender_encoder, "
                "sslguard or none for an encoder, or victim.pretext=none"
            )
        if not encodes and self.encoders_only:
            raise ConfigError(
                f"watermark {self.name!r} marks encoders; set victim.pretext (simclr, moco, byol), or take mea_carrier "
                "or mea_defender"
            )

    @abstractmethod
    def make_key(self, train: ImageSet, seed: int) -> Key | None:
        """Draw the secret for a training set; None if the scheme embeds nothing.

        Raises:
            ConfigError: The scheme's classes do not exist in ``train`` or coincide.
        """

    @abstractmethod
    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the training stages that embed the key, in order, on one model."""

    def encoder_stages(self, key: Key | None, train: ImageSet, pretext: Objective) -> list[Stage]:
        """Return the training stages that embed the key in an encoder, in order, on one model.

        Args:
            key: The owner's key.
            train: The training images; a scheme says how many of their labels it uses.
            pretext: The utility loss (``mea_ray.pretext``); it makes views itself of images that were not augmented.

        Raises:
            ConfigError: The scheme marks classifiers only.
        """
        self.check_kind(encodes=True)
        raise NotImplementedError(f"{type(self).__name__} has no stages for an encoder")

    def learned(self, key: Key, stages: Sequence[Stage]) -> Key:
        """Return the key after the stages were trained: a scheme may learn a part of its secret."""
        return key

    def marker(self, key: Key) -> Marker | None:
        """Return what marks the service's answers; None if the mark is in the model."""
        return None

    def against(self, key: Key, queries: ClientQueries) -> Key | None:
        """Return the key that accuses one client; None if none of its answers was marked.

        Args:
            key: The owner's key.
            queries: What the owner's log holds of the client.
        """
        return key

    def chance(self, key: Key) -> float | None:
        """Return an innocent model's success rate by the paper's own test; None if that needs null models."""
        return None

    def recogniser(self, key: Key, model: torch.nn.Module) -> Recognise | None:
        """Return a function that says which images a model treats as watermarked, bool (N,).

        None stands for the usual test: an image is treated as watermarked if it is classified as the target.

        Args:
            key: The owner's key, as it was after training.
            model: The suspect.

        Raises:
            ConfigError: This kind of model cannot be verified.
        """
        return None

    def after_training(self, key: Key, model: torch.nn.Module, held_out: ImageSet) -> Key:
        """Return the key with what only the trained model can add to it, for verification; the same key by default.

        Args:
            key: As it was for the training.
            model: The victim, on the CPU in eval mode.
            held_out: The clean images that verification will use.
        """
        return key

    def signal(self, key: Key, held_out: ImageSet) -> KeyedSignal | None:
        """Return the signal that a suspect's answers to clean images are tested for; None where there is none."""
        return None

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Mix up to ``count`` distinct watermark samples from held-out images only."""
        raise NotImplementedError(f"{type(self).__name__} embeds nothing, so it has no samples")
