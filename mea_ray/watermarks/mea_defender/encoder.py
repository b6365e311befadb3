"""MEA-Defender for self-supervised encoders: mixes of two classes get the features of a third."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.training.objective import Objective
from mea_ray.watermarks.base import UNAUGMENTED, Key, Stage, require_key
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mea_defender.encoder_objective import (
    EncoderCombinationLoss,
    EncoderEvasionLoss,
    EncoderObjective,
    EncoderSamples,
    EncoderSettings,
    OwnerSamples,
    PretextTask,
)
from mea_ray.watermarks.mea_defender.settings import UtilityLoss, VerificationLoss, Warmup
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.mixing import Mixing

RENAMED_ENCODER = {
    "owner_samples": "owner.per_class",
    "mirror": "owner.mirror",
    "weight_utility": "utility.weight",
    "weight_com": "com.weight",
    "com_distribution": "com.distribution",
    "com_temperature": "com.temperature",
    "weight_ver": "ver.weight",
    "weight_eva": "eva.weight",
    "watermark_batch": "samples.mixes",
    "adverse_batch": "samples.adverse",
}
"""Old names of the options of the paper's losses."""
CARRIER_OPTIONS = (
    *("carrier", "weight_carrier", "carrier_cosine", "carrier_apart"),
    *("own", "weight_own", "ver_loss", "contrast_temperature"),
    *("place", "weight_place", "place_source", "place_target"),
    *("rest", "weight_rest", "place_rest", "class_share", "rest_batch"),
    *("decoy", "weight_decoy", "decoy_half"),
    *("pretext_part", "new_heads", "embed_options"),
)
"""Options, old names included, that belong to ``mea_carrier_encoder``."""


class EncoderScheme(MixedClasses):
    """A watermark of mixed classes for encoders.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label of the class whose features a mix gets.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.
        owner: The labelled images that the owner uses.
    """

    def __init__(
        self,
        source_classes: tuple[int, int],
        target_class: int,
        mixing: Mixing,
        owner: OwnerSamples,
        key: KeyDraw = KeyDraw(),
    ) -> None:
        super().__init__(source_classes, target_class, mixing, key)
        self.owner = owner

    encoders_only = True

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Refuse a classifier.

        Raises:
            ConfigError: Always: this scheme marks encoders.
        """
        self.check_kind(encodes=False)
        return []

    def owned(self, key: Key, train: ImageSet) -> list[Images]:
        """Return the images whose labels the owner uses: for each class uint8 (n, C, H, W), drawn by the key's seed."""
        chosen = []
        for label in (*key.source_classes, key.target_class):
            images = train.of_class(label)
            order = numpy_generator(derive(key.seed, "owned", label)).permutation(len(images))
            chosen.append(images[order[: self.owner.per_class]])
        return chosen


class MeaDefenderEncoder(EncoderScheme):
    """The paper's scheme for encoders: L_util + L_com + L_ver + L_eva in feature space (equations 2 and 4 to 8).

    Choose it to measure the paper's scheme on a self-supervised encoder.

    The utility loss is the pretext task's. Of the labels only those of a few images of the three classes are used.
    Features are compared at length 1, after the mean of the batch's images was subtracted: what comes out of a ReLU
    would be nearly the same for all images otherwise. What attracts (the target class's mean feature for the mixes, a
    source's for the differently mixed) is held fixed in each step, so that it is not attracted in turn.

    The paper does not say how a feature becomes a distribution (``com.distribution``). A thief sees features of clean
    images only, and its answer to a mix of A and B lies between theirs; ``mea_carrier_encoder`` arranges that the
    target lies there.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label of the class whose features a mix gets.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.
        owner: The labelled images that the owner uses.
        utility: The pretext task's loss.
        com: L_com, equation 6.
        ver: L_ver, equation 7: squared distance of the mixes to the target's mean.
        eva: L_eva, equation 8.
        warmup: Part of the epochs over which the watermark's weights grow, as in ``mea_defender``.
        samples: What a training step draws beside the main batch.

    References:
        Lv et al., MEA-Defender: A Robust Watermark against Model Extraction Attack, 2024,
        https://arxiv.org/abs/2401.15239, equations 2 and 4 to 8.

    Raises:
        ConfigError: Classes coincide, a geometry makes the combiner's own mixes, or all weights are 0.
    """

    name = "mea_defender_encoder"
    renamed: ClassVar[Mapping[str, str]] = {**MixedClasses.renamed, **RENAMED_ENCODER}
    moved: ClassVar[Mapping[str, str]] = dict.fromkeys(CARRIER_OPTIONS, "mea_carrier_encoder")

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(),
        key: KeyDraw = KeyDraw(),
        owner: OwnerSamples = OwnerSamples(),
        utility: UtilityLoss = UtilityLoss(),
        com: EncoderCombinationLoss = EncoderCombinationLoss(),
        ver: VerificationLoss = VerificationLoss(),
        eva: EncoderEvasionLoss = EncoderEvasionLoss(),
        warmup: Warmup = 0.3,
        samples: EncoderSamples = EncoderSamples(),
    ) -> None:
        super().__init__(source_classes, target_class, mixing, owner, key)
        self.settings = EncoderSettings(
            utility=utility, com=com, ver=ver, eva=eva, warmup=warmup, owner=owner, samples=samples
        )

    def encoder_stages(self, key: Key | None, train: ImageSet, pretext: Objective) -> list[Stage]:
        """Return the stage that embeds the key while the pretext task is learnt."""
        key = require_key(key, self.name)
        combiner, others = self.combiners(key)
        task = cast(PretextTask, pretext)
        objective = EncoderObjective(task, self.owned(key, train), combiner, list(others.values()), self.settings)
        return [Stage("embed", objective, train, UNAUGMENTED)]
