"""SSLGuard (Cong et al., CCS 2022): a patched image's feature decodes to a secret vector; the baseline for encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Recognise
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.training.objective import Objective
from mea_ray.watermarks.base import UNAUGMENTED, Key, Stage, Watermark, WatermarkSamples, require_key
from mea_ray.watermarks.combiners.base import to_uint8
from mea_ray.watermarks.sslguard_objective import Decoder, GuardObjective, GuardSettings, blend

SECRET = 256
"""Length of the secret vector."""


class SslGuard(Watermark):
    """An encoder whose features of images under a secret patch a secret decoder turns into a secret vector.

    Choose it as the baseline for encoders.

    First the pretext task is learnt. Then the encoder is tuned beside a copy of it (the clean encoder) and a shadow
    encoder, which is distilled from it all the while, as a thief would do. Patch and decoder are trained so that the
    features of the marked and of the shadow encoder decode to the secret under the patch, those of the clean one do
    not, and without the patch none do.

    It has a verification of its own: a watermark sample succeeds if the cosine of its decoded feature and the secret is
    above ``threshold``. WFPR counts held-out images without the patch (``clean``) and under another patch of the same
    mask (``other_patch``). The decoder takes features of the victim's width, so that only encoders of that width can be
    verified: a thief who changes it escapes.

    Args:
        mask_share: Share of the pixels that the patch covers.
        embed_part: Part of the training's epochs that tune the encoder; the others learn the pretext task.
        learning_rate: Of the encoder while it is tuned; SGD with momentum .9, as for the other three. (Published: 1e-5
            for a ResNet-50 over 1.25 million batches of 2; the default suits a short schedule.)
        shadow_learning_rate: Of the shadow encoder; times .96 after each epoch.
        patch_learning_rate: Of the patch.
        decoder_learning_rate: Of the decoder.
        batch_size: Of the tuning. (Published: 2.) The paper's losses that suppress the secret act on the *mean* cosine
            of a batch: in a large one, positive and negative cosines cancel.
        threshold: Least cosine of a success.
        gradients: ``separate``: each part is moved by its own losses, as the equations say. ``leak``: as in the
            published code, where the encoder is also moved by the shadow's, the patch's and the decoder's losses, and
            the patch by the encoder's of the step before.
        weight_strangers: Weight of a term of the decoder that is not in the paper; 0 is the paper's own loss. The paper
            suppresses the secret for the encoder that the marked one was tuned from. Features of an encoder trained
            from other weights may still decode to it. The term suppresses it, image by image, for patched features
            whose neurons are in a random order, as those of such an encoder are to the decoder.

    References:
        Cong, He, Zhang, SSLGuard: A Watermarking Scheme for Self-supervised Learning Pre-trained Encoders, CCS 2022,
        https://arxiv.org/abs/2201.11692.
    """

    name = "sslguard"
    reads_features = True

    def __init__(
        self,
        *,
        mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.35,
        embed_part: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        learning_rate: Annotated[float, Field(gt=0)] = 3e-4,
        shadow_learning_rate: Annotated[float, Field(gt=0)] = 1e-2,
        patch_learning_rate: Annotated[float, Field(gt=0)] = 3e-2,
        decoder_learning_rate: Annotated[float, Field(gt=0)] = 3e-3,
        batch_size: Annotated[int, Field(ge=2)] = 8,
        threshold: Annotated[float, Field(gt=-1, lt=1)] = 0.5,
        gradients: Literal["separate", "leak"] = "separate",
        weight_strangers: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        rates = {"shadow": shadow_learning_rate, "patch": patch_learning_rate, "decoder": decoder_learning_rate}
        self.mask_share, self.embed_part, self.learning_rate = mask_share, embed_part, learning_rate
        self.threshold, self.batch_size = threshold, batch_size
        self.guard = GuardSettings(rates, leak=gradients == "leak", strangers=weight_strangers)

    encoders_only = True

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the secret vector, the mask and the patch to begin with; ``learned`` replaces patch and adds decoder."""
        rng = numpy_generator(derive(seed, "key"))
        _, height, width = train.shape
        tensors = {
            "secret": rng.standard_normal(SECRET).astype(np.float32),
            "mask": (rng.random((1, height, width)) < self.mask_share).astype(np.float32),
            "patch": rng.random(train.shape).astype(np.float32),
        }
        # No classes: -1 is no label, so that nothing is mistaken for one.
        return Key(self.name, (-1, -1), -1, derive(seed, "key"), {"threshold": self.threshold}, tensors)

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Refuse a classifier.

        Raises:
            ConfigError: Always: this scheme marks encoders.
        """
        self.check_kind(encodes=False)
        return []

    def encoder_stages(self, key: Key | None, train: ImageSet, pretext: Objective) -> list[Stage]:
        """Return two stages: the pretext task, then the encoder is tuned while patch and decoder are learnt."""
        key = require_key(key, self.name)
        objective = GuardObjective(
            {name: torch.from_numpy(value.copy()) for name, value in key.tensors.items()}, self.guard
        )
        tuning: dict[str, Any] = {
            "optimizer": "sgd",
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "schedule": "constant",
            **UNAUGMENTED,
        }
        return [
            Stage("pretext", pretext, train, UNAUGMENTED, span=(0, 1 - self.embed_part)),
            Stage("embed", objective, train, tuning, span=(1 - self.embed_part, 1)),
        ]

    def learned(self, key: Key, stages: Sequence[Stage]) -> Key:
        """Return the key with the patch and the decoder that the embedding learnt."""
        (objective,) = (stage.objective for stage in stages if isinstance(stage.objective, GuardObjective))
        return replace(key, tensors={**key.tensors, **objective.learned()})

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Patch up to ``count`` distinct held-out images, of all classes.

        Raises:
            DataError: There are no held-out images, or their shape is not the key's.
        """
        if not len(held_out) or held_out.shape != key.tensors["patch"].shape:
            raise DataError(
                f"{len(held_out)} held-out images of {held_out.shape}, the key's patch is "
                f"{key.tensors['patch'].shape}; verify with the data that the victim was trained on"
            )
        _, distinct = np.unique(held_out.images.reshape(len(held_out), -1), axis=0, return_index=True)
        chosen = numpy_generator(seed, "samples").permutation(np.sort(distinct))[:count]
        images = held_out.images[chosen]
        other = numpy_generator(key.seed, "other patch").random(held_out.shape).astype(np.float32)
        nothing = images[:0]
        return WatermarkSamples(
            images=patched(images, key.tensors["mask"], key.tensors["patch"]),
            target=key.target_class,
            adverse={"clean": images, "other_patch": patched(images, key.tensors["mask"], other)},
            sources=nothing,
            source_labels=np.zeros(0, np.int64),
        )

    def recogniser(self, key: Key, model: torch.nn.Module) -> Recognise:
        """Return a function that says for which images the decoded feature points at the secret, bool (N,).

        Raises:
            ConfigError: The model is no encoder, or its features are not of the victim's width.
            ArtifactError: The key has no decoder: it was never embedded.
        """
        if "decoder.0.weight" not in key.tensors:
            raise ArtifactError("the key has no decoder, so it was not embedded yet; train the victim first")
        width = key.tensors["decoder.0.weight"].shape[1]
        if not isinstance(model, ImageModel) or model.feature_size != width:
            raise ConfigError(
                f"SSLGuard's decoder reads features of length {width}, not those of {type(model).__name__}"
                f" ({getattr(model, 'feature_size', 'none')}); take a substitute of the victim's feature width"
            )
        decoder = Decoder.restored(key.tensors, "decoder.")
        secret = torch.from_numpy(key.tensors["secret"])
        threshold = float(key.settings["threshold"])

        def recognise(images: Images) -> npt.NDArray[np.bool_]:
            with torch.inference_mode():
                decoded = decoder(torch.from_numpy(metrics.features(model, images)))
                similar: npt.NDArray[np.bool_] = (
                    torch.cosine_similarity(decoded, secret[None], dim=1) > threshold
                ).numpy()
            return similar

        return recognise


def patched(images: Images, mask: npt.NDArray[np.float32], patch: npt.NDArray[np.float32]) -> Images:
    """Put the patch on images where the mask is 1: uint8 (N, C, H, W)."""
    mixed = blend(torch.from_numpy(images).float() / 255, torch.from_numpy(mask), torch.from_numpy(patch))
    made: Images = to_uint8(mixed).numpy()
    return made
