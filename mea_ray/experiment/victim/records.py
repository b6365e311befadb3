"""The content of ``victim.json``, which gives nothing of the key away."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mea_ray.models.base import ImageModel
from mea_ray.results.records import Count, Fraction, ModelReport

SCHEMA_VERSION: Literal[1] = 1


class _VictimPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class InputFormat(_VictimPart):
    """The input format of the network and its exported copies.

    Attributes:
        channels: 1 for grey images, 3 for colour.
        height: In pixels.
        width: In pixels.
        channel_order: Order of the channels that the file expects.
        value_range: Values of black and of white.
        mean: Subtracted inside the network, one value per channel, in units of [0, 1]. Do not subtract it again.
        deviation: Divided by inside the network, one value per channel.
    """

    channels: Count
    height: Count
    width: Count
    channel_order: Literal["RGB", "grey", "other"]
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, model: ImageModel) -> InputFormat:
        """Return what a network of mea_ray expects: it takes images in [0, 1] and normalises them itself."""
        channels, height, width = model.shape
        orders: dict[int, Literal["RGB", "grey"]] = {1: "grey", 3: "RGB"}
        return cls(
            channels=channels,
            height=height,
            width=width,
            channel_order=orders.get(channels, "other"),
            mean=tuple(map(float, model.mean.flatten())),
            deviation=tuple(map(float, model.std.flatten())),
        )


class Card(_VictimPart):
    """The data, training and cost of a victim.

    Attributes:
        data: Name of the dataset.
        data_fingerprint: Hash of its content, see ``Dataset.fingerprint``.
        train_images: Images that the victim was trained on.
        test_images: Images that the accuracies were measured on.
        accuracy: The victim's, on the test images.
        accuracy_before: That of the trained classifier that the mark was embedded into; None if the victim was trained
            from scratch.
        accuracy_null: Mean over the null models; None without any.
        source_cost: Accuracy that customers lose on the marked classes, against the null models or the classifier
            before, in [-1, 1]; None without either. The classes are the key's secret and are not named.
        calibration_cost: Calibration error that the mark adds on the same images.
        null_models: Null models that ``accuracy_null`` was measured on.
        watermark: Name of the scheme.
        seconds: Wall time of the training.
    """

    data: str
    data_fingerprint: str
    train_images: Count
    test_images: Count
    accuracy: Fraction
    accuracy_before: Fraction | None = None
    accuracy_null: Fraction | None = None
    source_cost: float | None = None
    calibration_cost: float | None = None
    null_models: Count = 0
    watermark: str
    seconds: float = Field(0.0, ge=0)


class VictimRecord(_VictimPart):
    """The content of ``victim.json``.

    Attributes:
        name: Name of the victim.
        created: Date and time in UTC, ISO 8601.
        weights_sha256: Hash of ``model.safetensors``, to which a commitment refers.
        class_names: One name per class, in the order of the logits.
        preprocessing: The input format.
        card: Data, training and cost of the victim.
        exports: The exported copies, file name to SHA-256.
        versions: Versions of the packages that made it.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: str
    weights_sha256: str
    class_names: tuple[str, ...]
    preprocessing: InputFormat
    card: Card
    exports: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)


class OwnerRecord(_VictimPart):
    """The content of ``owner/report.json``, which is private to the owner.

    Attributes:
        artifact: Name of the victim among the artifacts of a storage. It is a hash of everything that determines the
            victim, the key's classes included. Someone who knows the rest could find these by brute force.
        report: Verification of the victim.
    """

    artifact: str
    report: ModelReport
