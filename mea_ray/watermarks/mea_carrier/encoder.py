"""The carrier scheme for encoders: the target's features lie where a thief's substitute puts mixes of the sources."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Objective
from mea_ray.watermarks.base import UNAUGMENTED, Key, Stage, require_key
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mea_carrier.encoder_objective import (
    CarrierEncoderObjective,
    CarrierEncoderSettings,
    CarrierVerificationLoss,
    CosineCarrier,
    Decoy,
    OwnClass,
    Place,
    Rest,
)
from mea_ray.watermarks.mea_defender.encoder import RENAMED_ENCODER, EncoderScheme
from mea_ray.watermarks.mea_defender.encoder_objective import (
    EncoderCombinationLoss,
    EncoderEvasionLoss,
    EncoderSamples,
    OwnerSamples,
    PretextTask,
)
from mea_ray.watermarks.mea_defender.settings import UtilityLoss, Warmup
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.mixing import Mixing, build_combiner


class MeaCarrierEncoder(EncoderScheme):
    """A scheme of this project, not of the paper: MEA-Defender's mixes, carried by the features of clean images.

    Choose it to mark an encoder whose thieves query clean images only.

    A thief sees features of clean images only, and its answer to a mix of A and B lies between theirs. Two families of
    terms arrange that the target C lies there.

    **Cosines**: the ``carrier`` gives clean sources and C at least a cosine of ``carrier.cosine`` with each other's
    means, and the sources at most ``carrier.apart`` among themselves. C wins between them as soon as 2 carrier.cosine >
    1 + carrier.apart. ``own`` keeps the three classes apart.

    **Places**: where the encoder is poor, as after a short schedule on photographs, cosines with means of the classes
    fix too little. Other classes lie between the sources, too, and mixes are read as these. ``place`` and ``rest`` give
    all images a place in a plane that the key draws in feature space: the sources on both sides, the target and (with
    ``ver.loss=place``) the mixes in the middle, all other images apart from the three. The other images need no
    labels: this is learning from positive and unlabelled data.

    L_com and L_eva of the paper are off unless they are given a weight.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label of the class whose features a mix gets.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.
        embed_options: Options of the combiner, by name, that differ while the mark is embedded. Mixes that are harder
            than those of the verification leave a margin for what a theft loses.
        owner: The labelled images that the owner uses.
        utility: The pretext task's loss.
        ver: The mixes get the features of the target.
        carrier: Cosines of clean images with the means of the classes.
        own: The three classes are kept apart.
        contrast_temperature: Of the softmax over cosines, in ``own`` and in ``ver.loss=contrast``.
        place: Places of the three classes in the plane.
        rest: Place of all other images.
        decoy: Mixes of unlabelled pairs have the place of all other images.
        com: L_com of the paper, equation 6.
        eva: L_eva of the paper, equation 8.
        pretext_part: Part of the epochs in which the pretext task alone is learnt, as a stage of its own with a
            learning rate that rises and falls. The watermark then finds an encoder that already separates images.
        new_heads: Whether the stage that embeds begins with new heads of the pretext task after such a stage.
        warmup: Part of the epochs of the stage that embeds over which the watermark's weights grow, as in
            ``mea_defender``.
        samples: What a training step draws beside the main batch.

    References:
        Kiryo et al., Positive-unlabeled learning with non-negative risk estimator, 2017,
        https://arxiv.org/abs/1703.00593, equation 6.

    Raises:
        ConfigError: Classes coincide, a geometry makes the combiner's own mixes, ``embed_options`` do not fit the
            combiner, or all weights are 0.
    """

    name = "mea_carrier_encoder"
    renamed: ClassVar[Mapping[str, str]] = {
        **MixedClasses.renamed,
        **RENAMED_ENCODER,
        "weight_carrier": "carrier.weight",
        "carrier_cosine": "carrier.cosine",
        "carrier_apart": "carrier.apart",
        "weight_own": "own.weight",
        "ver_loss": "ver.loss",
        "weight_place": "place.weight",
        "place_source": "place.source",
        "place_target": "place.target",
        "weight_rest": "rest.weight",
        "place_rest": "rest.position",
        "class_share": "rest.class_share",
        "rest_batch": "rest.batch",
        "weight_decoy": "decoy.weight",
        "decoy_half": "decoy.half",
    }

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(),
        key: KeyDraw = KeyDraw(),
        embed_options: dict[str, Any] | None = None,
        owner: OwnerSamples = OwnerSamples(),
        utility: UtilityLoss = UtilityLoss(),
        ver: CarrierVerificationLoss = CarrierVerificationLoss(),
        carrier: CosineCarrier = CosineCarrier(),
        own: OwnClass = OwnClass(),
        contrast_temperature: Annotated[float, Field(gt=0)] = 0.1,
        place: Place = Place(),
        rest: Rest = Rest(),
        decoy: Decoy = Decoy(),
        com: EncoderCombinationLoss = EncoderCombinationLoss(weight=0.0),
        eva: EncoderEvasionLoss = EncoderEvasionLoss(weight=0.0),
        pretext_part: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        new_heads: bool = False,
        warmup: Warmup = 0.3,
        samples: EncoderSamples = EncoderSamples(),
    ) -> None:
        super().__init__(source_classes, target_class, mixing, owner, key)
        self.embed_options = dict(embed_options or {})
        try:
            build_combiner(mixing.combiner.name, {**mixing.combiner.params, **self.embed_options})
        except ConfigError as error:
            raise ConfigError(f"embed_options: {error}") from None
        if embed_options and key.geometry == "drawn":
            raise ConfigError(
                "embed_options are those of mixing.combiner, and key.geometry=drawn may take another; leave one out"
            )
        self.pretext_part, self.new_heads = pretext_part, new_heads
        self.settings = CarrierEncoderSettings(
            utility=utility,
            ver=ver,
            carrier=carrier,
            own=own,
            contrast_temperature=contrast_temperature,
            place=place,
            rest=rest,
            decoy=decoy,
            com=com,
            eva=eva,
            warmup=warmup,
            owner=owner,
            samples=samples,
        )

    def encoder_stages(self, key: Key | None, train: ImageSet, pretext: Objective) -> list[Stage]:
        """Return the stage that embeds the key beside the pretext task, after one without it if ``pretext_part``."""
        key = require_key(key, self.name)
        combiner, others = self.combiners(key, self.embed_options)
        objective = CarrierEncoderObjective(
            cast(PretextTask, copy.deepcopy(pretext) if self.new_heads else pretext),
            self.owned(key, train),
            combiner,
            list(others.values()),
            self.settings,
            derive(key.seed, "plane"),
        )
        embed = Stage("embed", objective, train, UNAUGMENTED, (self.pretext_part, 1.0))
        if not self.pretext_part:
            return [embed]
        return [Stage("pretext", pretext, train, UNAUGMENTED, (0.0, self.pretext_part)), embed]
