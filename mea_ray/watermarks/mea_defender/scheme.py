"""MEA-Defender (Lv et al., 2024): mixes of two source classes get the label of a third."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.types import ImageSet
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mea_defender.objective import MeaDefenderObjective
from mea_ray.watermarks.mea_defender.settings import (
    CombinationLoss,
    EvasionLoss,
    LossWeights,
    PaperSettings,
    StepSamples,
    UtilityLoss,
    VerificationLoss,
    Warmup,
)
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.mixing import Mixing

RENAMED = {
    "weighting": "weights.method",
    "gradient_normalisation": "weights.normalisation",
    "weight_utility": "utility.weight",
    "weight_com": "com.weight",
    "com_gradient": "com.gradient",
    "com_direction": "com.direction",
    "com_schedule": "com.schedule",
    "com_pulse": "com.pulse",
    "com_period": "com.period",
    "weight_ver": "ver.weight",
    "weight_eva": "eva.weight",
    "eva_label": "eva.label",
    "watermark_batch": "samples.mixes",
    "adverse_batch": "samples.adverse",
    "augment_sources": "samples.augment",
}
"""Old names of the options of the paper's losses."""
CARRIER_OPTIONS = (
    *("carrier", "weight_carrier", "carrier_rho", "carrier_labels"),
    *("carrier_gate", "carrier_gate_odds", "carrier_gate_part"),
    *("exclusion", "weight_exclusion", "exclusion_margin", "exclusion_scope"),
    *("bridge", "weight_bridge", "bridge_sigma"),
)
"""Options, old names included, that belong to ``mea_carrier``."""


class MeaDefender(MixedClasses):
    """The paper's scheme: alpha1 L_util + beta1 L_com + beta2 L_ver + alpha3 L_eva (equations 4 and 5), from scratch.

    Choose it to measure the paper's scheme as it was published.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label that the victim gives to a mix.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.
        utility: L_util, cross-entropy of the main batch.
        com: L_com, equation 6.
        ver: L_ver, equation 7.
        eva: L_eva, equation 8.
        warmup: Part of the epochs over which the weights of L_com, L_ver and L_eva grow: 0 in its first half, then
            linearly to their values. The mixes are few but weigh as much as the main batch. A network that learns
            slowly (with BatchNorm and a global average, say) answers everything with the target class, and hardly
            leaves that again. 0 embeds from the first step, as the paper does.
        samples: What a training step draws beside the main batch.
        weights: How the losses become one gradient: their weighted sum, or equation 9 (``mgda``).

    References:
        Lv et al., MEA-Defender: A Robust Watermark against Model Extraction Attack, 2024,
        https://arxiv.org/abs/2401.15239.

    Raises:
        ConfigError: Classes coincide, a geometry makes the combiner's own mixes, or all weights are 0.
    """

    name = "mea_defender"
    renamed: ClassVar[Mapping[str, str]] = {**MixedClasses.renamed, **RENAMED}
    moved: ClassVar[Mapping[str, str]] = dict.fromkeys(CARRIER_OPTIONS, "mea_carrier")

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(),
        key: KeyDraw = KeyDraw(),
        utility: UtilityLoss = UtilityLoss(),
        com: CombinationLoss = CombinationLoss(),
        ver: VerificationLoss = VerificationLoss(),
        eva: EvasionLoss = EvasionLoss(),
        warmup: Warmup = 0.3,
        samples: StepSamples = StepSamples(),
        weights: LossWeights = LossWeights(),
    ) -> None:
        super().__init__(source_classes, target_class, mixing, key)
        self.settings = PaperSettings(
            utility=utility, com=com, ver=ver, eva=eva, warmup=warmup, samples=samples, weights=weights
        )

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the stage that embeds the key while the main task is learnt."""
        key = require_key(key, self.name)
        combiner, others = self.combiners(key)
        classes = (*key.source_classes, key.target_class)
        objective = MeaDefenderObjective(train, classes, combiner, list(others.values()), self.settings)
        return [Stage("embed", objective, train)]
