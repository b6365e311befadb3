"""What a service makes of its answer policy: fitted on the owner's images, and marked where the key says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mea_ray.blackbox.embeddings import PlainEmbedding
from mea_ray.blackbox.marking import MarkingPolicy
from mea_ray.blackbox.outliers import OutlierFilter
from mea_ray.blackbox.passes import FixedShapePasses
from mea_ray.blackbox.policies import AnswerPolicy
from mea_ray.config import ExperimentConfig, load_experiment
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Images, Marker, Splits
from mea_ray.data.splits import make_splits
from mea_ray.models.base import ImageModel
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
    """Return the policy that a service answers by.

    Args:
        policy: As the config words it.
        model: The victim.
        key: The owner's key; None marks nothing.
        clean: Gives the owner's training images, uint8 (N, C, H, W), for a policy that learns from them.
        pass_images: Images in a pass, as of the service.
    """
    if isinstance(policy, OutlierFilter):
        chosen = policy.choose(clean())
        if policy.reads_features:
            # In passes as those of the service: an image has the same features, bit for bit, here and when it is asked.
            passes = FixedShapePasses(model, model.shape, PlainEmbedding(), pass_images=pass_images)
            policy.fit(passes.answer([chosen])[0])
        else:
            policy.fit(policy.pixels(chosen))
    marker = marker_of(key)
    return policy if marker is None else MarkingPolicy(marker, policy)


def marker_of(key: Key | None) -> Marker | None:
    """Return what a key does to the answers of a service; None for most schemes, whose mark is in the model."""
    if key is None:
        return None
    watermark: Watermark = WATERMARKS.build(key.scheme)
    return watermark.marker(key)


class Served(nn.Module):
    """A victim with its marker as one network: what a customer of the service meets, for the owner's own measurements.

    Args:
        model: The victim.
        marker: What the service does to its answers.
    """

    def __init__(self, model: nn.Module, marker: Marker) -> None:
        super().__init__()
        self.model, self.marker = model, marker

    def forward(self, x: Tensor) -> Tensor:
        """Return logarithms of the marked probabilities, (N, classes), of float32 images in [0, 1]."""
        images = np.rint(x.detach().cpu().numpy() * 255).astype(np.uint8)
        probabilities = torch.softmax(self.model(x), dim=1)
        changed, _ = self.marker.mark(probabilities.cpu().numpy(), images)
        return torch.from_numpy(changed).to(x.device).clamp_min(1e-12).log()


def split(config: ExperimentConfig, *, with_pool: bool = True) -> Splits:
    """Load and split the data. The cuts belong to the victim, so they follow from its seed and not from the thief's.

    Args:
        config: The experiment.
        with_pool: Load the thief's pool, too, if it is another dataset; the owner's images do not depend on it.
    """
    pool = config.splits.thief_pool
    if not isinstance(pool, str):
        pool = pool.build() if with_pool else "train"
    return make_splits(
        config.data.build(),
        validation_fraction=config.splits.validation_fraction,
        verification_fraction=config.splits.verification_fraction,
        thief_pool=pool,
        disjoint_fraction=config.splits.disjoint_fraction,
        seed=derive(config.victim.seed, "splits"),
    )


def stored_key(folder: Path) -> Key | None:
    """Return the key in a victim's folder; None for a victim without a watermark.

    Raises:
        ArtifactError: It is damaged.
    """
    return Key.load(folder) if (folder / "key.json").exists() else None


def stored_owners_images(folder: Path) -> Images:
    """Load the images that a stored victim was trained on, by the config that lies beside it: uint8 (N, C, H, W).

    Raises:
        ConfigError: There is no config beside the model.
        DataError: The dataset is not at hand on this machine.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(
            f"the answer policy learns from the owner's images, and {folder} holds no config.yaml that names them; "
            "serve a victim that mea_ray trained, or choose another service.policy"
        )
    return split(load_experiment(folder / "config.yaml"), with_pool=False).victim_train.images
