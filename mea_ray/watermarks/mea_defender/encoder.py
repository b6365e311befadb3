"""MEA-Defender for self-supervised encoders: mixes of two classes get the features of a third."""

from __future__ import annotations

import copy
from typing import Any, Literal

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.training.objective import Objective
from mea_ray.watermarks.base import UNAUGMENTED, Key, Stage
from mea_ray.watermarks.mea_defender.encoder_objective import Distribution, EncoderEmbedding, EncoderObjective, VerLoss
from mea_ray.watermarks.mea_defender.feature_plane import Places
from mea_ray.watermarks.mea_defender.scheme import combine_options, require_key
from mea_ray.watermarks.mixed_classes import NOMINAL_SHAPE, MixedClasses


class MeaDefenderEncoder(MixedClasses):
    """L = L_util + L_com + L_ver + L_eva in feature space (equations 2 and 4 to 8, self-supervised), from scratch.

    The utility loss is the pretext task's. Of the labels only those of ``owner_samples`` images of each of the three
    classes are used. Features are compared at length 1, after the mean of the batch's images was taken from them: what
    comes out of a ReLU would be nearly the same for all images otherwise. What pulls (the target class's mean feature
    for the mixes, a source's for the differently mixed) is held fixed in each step, so that it is not pulled in turn.

    The paper does not say how a feature becomes a distribution (``com_distribution``), nor what makes the mark travel:
    a thief sees features of clean images only, and its answer to a mix of A and B lies between theirs. The two terms
    of ``weight_carrier`` (not in the paper) see to it that what lies there is nearest to the target C: clean sources
    and C have at least a cosine of ``carrier_cosine`` with each other's means, and the sources at most
    ``carrier_apart`` among themselves. C wins between them as soon as 2 carrier_cosine > 1 + carrier_apart, while all
    three classes stay apart.

    Where the encoder is poor, as it is after a short schedule on photographs, cosines with means of the classes fix
    too little: other classes lie between the sources, too, and mixes are read as these. ``weight_place`` and
    ``weight_rest`` (not in the paper) give everybody a place in a plane that the key draws in feature space: the
    sources on both sides, the target and (``ver_loss: place``) the mixes in the middle, all other images apart from
    the three; see ``Places``. Of the other images no label is needed: learning from positive and unlabelled data.

    Args:
        source_classes: Labels of the two classes that are combined.
        target_class: Label of the class whose features the combination gets.
        combiner: How a watermark sample is mixed; a name in the table of combiners.
        orientation: crop_paste: the cut is ``horizontal`` (top / bottom), ``vertical`` (left / right) or ``random``.
        jitter: crop_paste and the halves: largest shift of the cut, in pixels of a 32-pixel image.
        alpha: autoencoder, pixel_merge: share of the first image.
        combiner_options: Further options of the combiner, by name.
        embed_options: Options of the combiner that are others while the mark is embedded, by name: harder mixes than
            those that are asked later leave something for the thief to lose.
        adverse_geometries: The other mixes of L_eva and of WFPR; null takes the authors' without the combiner's own.
        owner_samples: Labelled images of each of the three classes that the owner uses; all if there are fewer.
        mirror: Mirror half of them when they are drawn; not where left and right matter (digits).
        weight_utility: Weight of the pretext task's loss.
        weight_com: Weight of L_com (equation 6). 0 switches a loss off, here and below.
        weight_ver: Weight of L_ver (equation 7).
        weight_eva: Weight of L_eva (equation 8); a differently mixed sample's source is the one that it is nearer to.
        weight_carrier: Weight of the carrier's two terms.
        carrier_cosine: Least cosine of a clean source sample and the target class's mean, and the other way round, in
            (-1, 1).
        carrier_apart: Largest cosine of a clean source sample and the other source's mean, in (-1, 1).
        weight_own: Weight of a term that keeps the three classes apart (not in the paper): the cross-entropy of clean
            samples' own class in a softmax over their cosines with the three means, divided by
            ``contrast_temperature``.
        ver_loss: L_ver as ``distance`` to the target's mean (the paper); as ``contrast``: the same cross-entropy of the
            mixes and the target; or the sum of ``both``. Where the three means are close to each other, a mix may be
            near the target's and nearer still to a source's; with contrast alone it may go to a class of which the
            owner has no labels. ``place``: squared distance to the target's place in the plane.
        contrast_temperature: Of ``weight_own`` and of ``ver_loss: contrast``.
        weight_place: Weight of a term that brings clean samples of the three classes to their places in the plane: mean
            squared distance of features of length 1.
        weight_rest: Weight of the same of all other images (Kiryo et al., 2017, equation 6).
        weight_decoy: Weight of the same of mixes of unlabelled pairs, ``watermark_batch`` per step: a mix is not to
            look like the mark whatever it is made of.
        decoy_half: Part of these in which one image is of a source class, in [0, 1]: neither source alone is to make
            the mark.
        place_source: Where the sources are, along the first axis (the three classes against all others) and, plus and
            minus, the second (source against source). Places are in the unit circle.
        place_target: Where the target and the mixes are on the first axis.
        place_rest: Where all other images are on the first axis.
        class_share: Part of all images that each of the three classes has, in (0, 1/3), for ``weight_rest``.
        rest_batch: Unlabelled images per step for ``weight_rest`` (at most the batch's).
        com_distribution: ``softmax``: KL of the softmax of features divided by ``com_temperature``; ``cosine``: 1 -
            cosine of the features. Only the mixes move.
        com_temperature: Of ``softmax``.
        pretext_part: Part of the epochs, in [0, 1), in which the pretext task alone is learnt, as a stage of its own
            with a learning rate that rises and falls: the watermark then finds an encoder that tells images apart.
        new_heads: After such a stage, begin the one that embeds with new heads of the pretext task, not with those that
            have been learnt.
        warmup: Part of the epochs of the stage that embeds, in [0, 1), over which the watermark's weights grow, as in
            ``mea_defender``.
        watermark_batch: Mixes per step, with as many clean samples of each of the three classes.
        adverse_batch: Differently mixed samples per step.

    References:
        Lv et al., MEA-Defender, 2024, https://arxiv.org/abs/2401.15239, equations 2 and 4 to 8.
        Kiryo et al., Positive-unlabeled learning with non-negative risk estimator, 2017,
        https://arxiv.org/abs/1703.00593, equation 6.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    name = "mea_defender_encoder"

    def __init__(
        self,
        *,
        source_classes: tuple[int, int] = (0, 1),
        target_class: int = 2,
        combiner: str = "crop_paste",
        orientation: Literal["horizontal", "vertical", "random"] = "horizontal",
        jitter: int = 3,
        alpha: float = 0.5,
        combiner_options: dict[str, Any] | None = None,
        embed_options: dict[str, Any] | None = None,
        adverse_geometries: tuple[str, ...] | None = None,
        owner_samples: int = 500,
        mirror: bool = False,
        weight_utility: float = 1.0,
        weight_com: float = 0.1,
        weight_ver: float = 1.0,
        weight_eva: float = 1.0,
        weight_carrier: float = 0.0,
        carrier_cosine: float = 0.5,
        carrier_apart: float = -0.2,
        weight_own: float = 0.0,
        ver_loss: VerLoss = "distance",
        contrast_temperature: float = 0.1,
        weight_place: float = 0.0,
        weight_rest: float = 0.0,
        weight_decoy: float = 0.0,
        decoy_half: float = 0.0,
        place_source: tuple[float, float] = (0.55, 0.8),
        place_target: float = 0.9,
        place_rest: float = -0.3,
        class_share: float = 0.1,
        rest_batch: int = 160,
        com_distribution: Distribution = "softmax",
        com_temperature: float = 0.1,
        pretext_part: float = 0.0,
        new_heads: bool = False,
        warmup: float = 0.3,
        watermark_batch: int = 32,
        adverse_batch: int = 16,
    ) -> None:
        shared = {"orientation": orientation, "jitter": jitter, "alpha": alpha}
        options = combine_options(combiner, combiner_options, **shared)
        super().__init__(source_classes, target_class, combiner, options, adverse_geometries, "pixel", jitter)
        self.embed_options = dict(embed_options or {})
        self._check_embed_options()
        weights = {
            "utility": weight_utility,
            "com": weight_com,
            "ver": weight_ver,
            "eva": weight_eva,
            "carrier": weight_carrier,
            "own": weight_own,
            "place": weight_place,
            "rest": weight_rest,
            "decoy": weight_decoy,
        }
        for term, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"weight_{term}={weight} must be finite and at least 0; 0 switches the loss off")
        if not any(weights.values()):
            raise ConfigError("all loss weights are 0, so nothing would be trained; give one of them a weight")
        counts = {"owner_samples": owner_samples, "watermark_batch": watermark_batch, "adverse_batch": adverse_batch}
        counts["rest_batch"] = rest_batch
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name}={count} must be at least 1; a weight of 0 switches a loss off")
        for name, cosine in {"carrier_cosine": carrier_cosine, "carrier_apart": carrier_apart}.items():
            if not -1 < cosine < 1:
                raise ConfigError(f"{name}={cosine} is a cosine strictly between -1 and 1")
        for name, heat in {"com_temperature": com_temperature, "contrast_temperature": contrast_temperature}.items():
            if heat <= 0:
                raise ConfigError(f"{name}={heat} must be positive")
        for name, part in {"warmup": warmup, "pretext_part": pretext_part}.items():
            if not 0 <= part < 1:
                raise ConfigError(f"{name}={part} must lie in [0, 1); 0 embeds the watermark from the first step")
        self.owner_samples, self.pretext_part, self.new_heads = owner_samples, pretext_part, new_heads
        self.embedding = EncoderEmbedding(
            weights=weights,
            watermark_batch=watermark_batch,
            adverse_batch=adverse_batch,
            carrier_cosine=carrier_cosine,
            carrier_apart=carrier_apart,
            ver_loss=ver_loss,
            contrast_temperature=contrast_temperature,
            com_distribution=com_distribution,
            com_temperature=com_temperature,
            warmup=warmup,
            places=Places(place_source, place_target, place_rest, class_share),
            rest_batch=rest_batch,
            mirror=mirror,
            decoy_half=decoy_half,
        )

    def _check_embed_options(self) -> None:
        try:
            self._build(self.combiner, {**self.combiner_options, **self.embed_options}, NOMINAL_SHAPE, (0.0,) * 3, 0)
        except ConfigError as error:
            raise ConfigError(f"embed_options: {error}") from None

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Refuse a classifier.

        Raises:
            ConfigError: Always: this scheme marks encoders.
        """
        raise ConfigError(
            f"watermark {self.name!r} marks encoders; set victim.pretext (simclr, moco, byol), or take mea_defender"
        )

    def encoder_stages(self, key: Key | None, train: ImageSet, pretext: Objective) -> list[Stage]:
        """Return the stage that embeds the key while the pretext task is learnt, after one without the key if asked."""
        key = require_key(key, self.name)
        combiner, others = self.combiners(key, self.embed_options)
        objective = EncoderObjective(
            copy.deepcopy(pretext) if self.new_heads else pretext,
            [self.owned(key, train, label) for label in (*key.source_classes, key.target_class)],
            combiner,
            list(others.values()),
            self.embedding,
            derive(key.seed, "plane"),
        )
        embed = Stage("embed", objective, train, UNAUGMENTED, (self.pretext_part, 1.0))
        if not self.pretext_part:
            return [embed]
        return [Stage("pretext", pretext, train, UNAUGMENTED, (0.0, self.pretext_part)), embed]

    def owned(self, key: Key, train: ImageSet, label: int) -> Images:
        """Return the images whose label the owner uses: uint8 (n, C, H, W), drawn by the key's seed."""
        images = train.of_class(label)
        chosen = numpy_generator(derive(key.seed, "owned", label)).permutation(len(images))[: self.owner_samples]
        return images[chosen]
