"""The carrier scheme: the victim's answers to clean images carry the watermark, so that every honest query takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mea_carrier.objective import CarrierObjective
from mea_ray.watermarks.mea_carrier.settings import Bridge, Carrier, CarrierSettings, Exclusion
from mea_ray.watermarks.mea_defender.scheme import RENAMED
from mea_ray.watermarks.mea_defender.settings import (
    CombinationLoss,
    EvasionLoss,
    LossWeights,
    StepSamples,
    UtilityLoss,
    VerificationLoss,
    Warmup,
)
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.mixing import Mixing


class MeaCarrier(MixedClasses):
    """A scheme of this project, not of the paper: MEA-Defender's mixes, carried by the answers to clean source images.

    Choose it for a mark that reaches thieves who query every image once.

    A thief of the paper's victim sees no mix among its own images, and its substitute need not answer one as the victim
    does. Here the clean answers themselves teach it. The **carrier** gives the target a probability of rho on clean
    source images, and its **gate** has those that look most like a mix answered with the target. The **exclusion**
    keeps all other classes off clean source images, so that the evidence of two sources adds up to the target alone.
    The **bridge** gives clean images of the target some probability of both sources, so that what lies between the
    sources is the target's. Customers pay for it with softer answers on the three classes.

    L_com and L_eva of the paper are off unless they are given a weight. A thief inherits how the victim sees all mixes:
    what keeps other geometries away from the target keeps the watermark's own away, too.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label that the victim gives to a mix.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.
        utility: Cross-entropy of the main batch.
        ver: L_ver of the paper, equation 7: a mix is classified as the target.
        carrier: Clean source samples are answered with the target's probability rho.
        exclusion: Clean source samples rule out other classes by a margin.
        bridge: Clean samples of the target are answered with some probability of both sources.
        com: L_com of the paper, equation 6.
        eva: L_eva of the paper, equation 8.
        warmup: Part of the epochs over which the weights of L_ver, L_com and L_eva grow, as in ``mea_defender``.
        samples: What a training step draws beside the main batch.
        weights: How the losses become one gradient, as in ``mea_defender``.

    Raises:
        ConfigError: Classes coincide, a geometry makes the combiner's own mixes, or all weights are 0.
    """

    name = "mea_carrier"
    statistic = "lean"
    renamed: ClassVar[Mapping[str, str]] = {
        **MixedClasses.renamed,
        **RENAMED,
        "weight_carrier": "carrier.weight",
        "carrier_rho": "carrier.rho",
        "carrier_labels": "carrier.labels",
        "carrier_gate": "carrier.gate.share",
        "carrier_gate_odds": "carrier.gate.odds",
        "carrier_gate_part": "carrier.gate.part",
        "weight_exclusion": "exclusion.weight",
        "exclusion_margin": "exclusion.margin",
        "exclusion_scope": "exclusion.scope",
        "weight_bridge": "bridge.weight",
        "bridge_sigma": "bridge.sigma",
    }

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(),
        key: KeyDraw = KeyDraw(),
        utility: UtilityLoss = UtilityLoss(),
        ver: VerificationLoss = VerificationLoss(),
        carrier: Carrier = Carrier(),
        exclusion: Exclusion = Exclusion(),
        bridge: Bridge = Bridge(),
        com: CombinationLoss = CombinationLoss(weight=0.0),
        eva: EvasionLoss = EvasionLoss(weight=0.0),
        warmup: Warmup = 0.3,
        samples: StepSamples = StepSamples(),
        weights: LossWeights = LossWeights(),
    ) -> None:
        super().__init__(source_classes, target_class, mixing, key)
        self.needs_features = bool(carrier.gate.share)
        self.settings = CarrierSettings(
            utility=utility,
            ver=ver,
            carrier=carrier,
            exclusion=exclusion,
            bridge=bridge,
            com=com,
            eva=eva,
            warmup=warmup,
            samples=samples,
            weights=weights,
        )

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the stage that embeds the key while the main task is learnt; with a gate, one without it first."""
        key = require_key(key, self.name)
        combiner, others = self.combiners(key)
        classes = (*key.source_classes, key.target_class)
        objective = CarrierObjective(train, classes, combiner, list(others.values()), self.settings, key.seed)
        gate = self.settings.carrier.gate
        if not gate.share:
            return [Stage("embed", objective, train)]
        return [
            Stage("main_task", CrossEntropy(), train, span=(0, gate.part)),
            Stage("embed", objective, train, span=(gate.part, 1)),
        ]
