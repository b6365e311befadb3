"""A service's answers: its policy, fitted on the owner's images if it needs them, and the key's marker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mea_ray.blackbox.embeddings import PlainEmbedding
from mea_ray.blackbox.marking import MarkingPolicy
from mea_ray.blackbox.passes import FixedShapePasses, default_pass_images
from mea_ray.blackbox.policies import AnswerPolicy, FittedPolicy, KeyedPolicy, Probabilities, pixel_vectors
from mea_ray.config import ExperimentConfig, load_stored
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images, Marker, Splits
from mea_ray.experiment.data import load_owners_part
from mea_ray.models.base import ImageModel
from mea_ray.training.checkpoint import weights_secret
from mea_ray.training.device import device
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key, Watermark


def answer_policy(
    policy: AnswerPolicy,
    model: ImageModel,
    key: Key | None,
    clean: Callable[[], Images],
    *,
    pass_images: int | None = None,
) -> AnswerPolicy:
    """Return the answer policy of a service.

    Args:
        policy: The config's policy.
        model: The victim.
        key: The owner's key; None for unmarked answers.
        clean: Loads the owner's training images, uint8 (N, C, H, W), for a policy that is fitted on them.
        pass_images: Images in a forward pass of the service.
    """
    if isinstance(policy, KeyedPolicy):
        policy.use_secret(weights_secret(model))
    if isinstance(policy, FittedPolicy):
        chosen = policy.choose(clean())
        if policy.fits_on == "pixels":
            policy.fit(pixel_vectors(chosen))
        else:
            wording: AnswerPolicy = PlainEmbedding() if policy.fits_on == "features" else Probabilities()
            # With the service's batch size: the outputs here equal those of a query, bit for bit.
            policy.fit(FixedShapePasses(model, model.shape, wording, pass_images=pass_images).answer([chosen])[0])
    marker = marker_of(key)
    return policy if marker is None else MarkingPolicy(marker, policy)


def service_policy(config: ExperimentConfig, data: Splits, model: ImageModel, key: Key | None) -> AnswerPolicy:
    """Return the policy of the experiment's service in front of a model of an owner with this key."""
    policy = config.service.policy.build()
    return answer_policy(policy, model, key, lambda: data.victim_train.images, pass_images=pass_images(config))


def pass_images(config: ExperimentConfig) -> int:
    """Return the images in a forward pass of the experiment's service, on this device."""
    section = config.service
    return section.pass_images or default_pass_images(device(), section.max_batch_images)


def marker_of(key: Key | None) -> Marker | None:
    """Return how a key marks a service's answers; None for most schemes, whose mark is in the model."""
    if key is None:
        return None
    watermark: Watermark = WATERMARKS.build(key.scheme)
    return watermark.marker(key)


def served(model: nn.Module, key: Key | None) -> nn.Module:
    """Return the victim as its customers see it: with the key's marks in its answers, if any."""
    marker = marker_of(key)
    return model if marker is None else ServedModel(model, marker)


class ServedModel(nn.Module):
    """A victim and its marker as one network: the customers' answers, for the owner's measurements.

    Args:
        model: The victim.
        marker: Marks the service's answers.
    """

    def __init__(self, model: nn.Module, marker: Marker) -> None:
        super().__init__()
        self.model, self.marker = model, marker
        self.channels_last = getattr(model, "channels_last", True)

    def forward(self, x: Tensor) -> Tensor:
        """Return logarithms of the marked probabilities, (N, classes), of float32 images in [0, 1]."""
        images = np.rint(x.detach().cpu().numpy() * 255).astype(np.uint8)
        features = None
        if self.marker.reads_features:
            assert isinstance(self.model, ImageModel)
            inner = self.model.features(x)
            logits, features = self.model.head(inner), inner.cpu().numpy()
        else:
            logits = self.model(x)
        changed, _ = self.marker.mark(torch.softmax(logits, dim=1).cpu().numpy(), images, features)
        return torch.from_numpy(changed).to(x.device).clamp_min(1e-12).log()


def stored_key(folder: Path) -> Key | None:
    """Return the key in a victim's folder; None for a victim without a watermark.

    Raises:
        ArtifactError: It is damaged.
    """
    owners = owners_part(folder)
    return Key.load(owners) if (owners / "key.json").exists() else None


def owners_part(folder: Path) -> Path:
    """Return the folder of a victim's key and config: ``owner/``, or, in an artifact, the folder of the model."""
    return folder / "owner" if (folder / "owner").is_dir() else folder


def stored_owners_images(folder: Path) -> Images:
    """Load the images that a stored victim was trained on, by the config beside it: uint8 (N, C, H, W).

    Raises:
        ConfigError: There is no config beside the model.
        DataError: The dataset cannot be loaded on this machine.
    """
    config = owners_part(folder) / "config.yaml"
    if not config.exists():
        raise ConfigError(
            f"the answer policy is fitted on the owner's images, and {folder} has no config.yaml that names them; "
            "serve a victim that mea_ray trained, or choose another service.policy"
        )
    return load_owners_part(load_stored(config)).victim_train.images
