"""MEA-Defender (Lv et al., 2024): a watermark made of two source classes, so that it survives extraction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks.base import Key, Stage
from mea_ray.watermarks.combiners import COMBINERS
from mea_ray.watermarks.mea_defender.gate import Gate
from mea_ray.watermarks.mea_defender.objective import Embedding, MeaDefenderObjective
from mea_ray.watermarks.mea_defender.weighting import Normalisation, Weighting, make_weighting
from mea_ray.watermarks.mixed_classes import MixedClasses


def require_key(key: Key | None, scheme: str) -> Key:
    """Return the key.

    Raises:
        ConfigError: There is none, though the scheme embeds one.
    """
    if key is None:
        raise ConfigError(f"watermark {scheme!r} needs a key to embed; call make_key first")
    return key


def combine_options(name: str, options: Mapping[str, Any] | None, **shared: Any) -> dict[str, Any]:
    """Merge the options that several combiners share (those that ``name`` has) with the ones given for it."""
    known = {parameter.name for parameter in COMBINERS.parameters(name)}
    return {**{key: value for key, value in shared.items() if key in known}, **(options or {})}


class MeaDefender(MixedClasses):
    """The paper's loss: alpha1 L_util + beta1 L_com + beta2 L_ver + alpha3 L_eva (equations 4 and 5), from scratch.

    Args:
        source_classes: Labels of the two classes that are combined.
        target_class: Label that the victim gives to the combination.
        combiner: How a watermark sample is mixed; a name in the table of combiners.
        orientation: crop_paste: the cut is ``horizontal`` (top / bottom, the authors' code), ``vertical`` (left /
            right, the paper's text) or drawn for each sample.
        jitter: crop_paste and the halves: largest shift of the cut, in pixels of a 32-pixel image.
        alpha: autoencoder, pixel_merge: share of the first image.
        combiner_options: Further options of the combiner, by name.
        adverse_geometries: The other mixes of L_eva and of WFPR; null takes the authors' (both halves, diagonal, donut,
            hot dog) without those that the combiner itself gives.
        mix_space: Empty canvas is black (``pixel``) or of the training images' mean colour (``normalised``, as if
            mixed after normalisation: the authors' code).
        weight_utility: Weight of L_util, cross-entropy on the main batch.
        weight_com: Weight of L_com (equation 6). 0 switches a loss off, here and below.
        weight_ver: Weight of L_ver (equation 7).
        weight_eva: Weight of L_eva (equation 8).
        weight_carrier: Weight of the carrier term (not in the paper): clean source samples towards
            (1 - rho) own label + rho target.
        weight_exclusion: Weight of the exclusion term (not in the paper): clean source samples rule out other classes.
            With ``carrier_labels=replace`` these are the main batch's own source samples.
        weight_bridge: Weight of the bridge term (not in the paper): main-batch samples of the target class towards
            (1 - sigma) target + sigma / 2 of each source, so that what lies between the sources is the target's.
        carrier_rho: Target probability that the carrier term aims at, in (0, 0.5).
        carrier_labels: ``extra`` adds the term on drawn source samples; ``replace`` softens the labels of the source
            classes in the main batch instead, so that the realised probability is rho.
        carrier_gate: Share of each source class's training images, in [0, 0.5), that the victim answers the more with
            the target class the more they look like a mix to a network that knows the main task only. What lies beyond
            them, the mixes, is then the target's for a substitute too. 0 is no gate; else ``carrier_labels=replace``.
        carrier_gate_odds: Log-odds of the target against the own label for the image that looks most like a mix.
        carrier_gate_part: Part of the epochs, in (0, 1), that go to the main task alone, before the gate is drawn.
        exclusion_margin: Least difference of a clean source sample's own logit and that of a class it rules out.
        exclusion_scope: Ruled out is the other ``source`` class only, or ``all`` classes but the own and the target.
        bridge_sigma: Probability that the bridge term moves from the target to the sources, in (0, 0.6).
        com_gradient: Which answers L_com moves: those of ``both`` sides (equation 6 as it stands), only of the
            ``watermark`` samples (the authors' code), only of the ``sources``. Moving the sources pulls them towards
            the target: their own accuracy suffers first.
        com_direction: KL(f(x_wm) || f(x_s)) as in equation 6, or the other way round.
        com_schedule: Weight of L_com over the epochs: ``constant``, ``ramp`` (rising linearly to its value), or
            ``pulse`` (times ``com_pulse`` in every ``com_period``-th epoch, after the authors' code).
        com_pulse: Factor of a pulse.
        com_period: Epochs from pulse to pulse.
        eva_label: Each differently mixed sample gets one source label at ``random``, or half of each (``soft``).
        warmup: Part of the epochs, in [0, 1), over which the weights of L_com, L_ver and L_eva grow: 0 in its first
            half, then linearly to their values. The mixes are few but weigh as much as the main batch: a network that
            learns slowly (BatchNorm and a global average, say) answers everything with the target class and hardly
            leaves that again. 0 embeds from the first step, as the paper does.
        watermark_batch: Mixes per step; their sources add twice as many images if L_com, the carrier or the exclusion
            term is on.
        adverse_batch: Differently mixed samples per step.
        augment_sources: Augment source images as the main batch before they are mixed.
        weighting: ``fixed``, an aggregator of torchjd by name (``mgda`` is equation 9), or ``min_norm``, MGDA with the
            authors' gradient normalisations. Weights scale the losses before they are aggregated.
        gradient_normalisation: min_norm: what each gradient is divided by.
    """

    name = "mea_defender"

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
        adverse_geometries: tuple[str, ...] | None = None,
        mix_space: Literal["pixel", "normalised"] = "pixel",
        weight_utility: float = 1.0,
        weight_com: float = 0.1,
        weight_ver: float = 1.0,
        weight_eva: float = 1.0,
        weight_carrier: float = 0.0,
        weight_exclusion: float = 0.0,
        weight_bridge: float = 0.0,
        carrier_rho: float = 0.35,
        carrier_labels: Literal["extra", "replace"] = "extra",
        carrier_gate: float = 0.0,
        carrier_gate_odds: float = 1.5,
        carrier_gate_part: float = 0.3,
        exclusion_margin: float = 5.0,
        exclusion_scope: Literal["source", "all"] = "source",
        bridge_sigma: float = 0.3,
        com_gradient: Literal["both", "watermark", "sources"] = "watermark",
        com_direction: Literal["watermark_source", "source_watermark"] = "watermark_source",
        com_schedule: Literal["constant", "ramp", "pulse"] = "constant",
        com_pulse: float = 6.0,
        com_period: int = 10,
        eva_label: Literal["random", "soft"] = "random",
        warmup: float = 0.3,
        watermark_batch: int = 16,
        adverse_batch: int = 8,
        augment_sources: bool = True,
        weighting: str = "fixed",
        gradient_normalisation: Normalisation = "loss+",
    ) -> None:
        shared = {"orientation": orientation, "jitter": jitter, "alpha": alpha}
        options = combine_options(combiner, combiner_options, **shared)
        super().__init__(source_classes, target_class, combiner, options, adverse_geometries, mix_space, jitter)
        weights = {
            "utility": weight_utility,
            "com": weight_com,
            "ver": weight_ver,
            "eva": weight_eva,
            "carrier": weight_carrier,
            "exclusion": weight_exclusion,
            "bridge": weight_bridge,
        }
        for term, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"weight_{term}={weight} must be finite and at least 0; 0 switches the loss off")
        if not any(weights.values()):
            raise ConfigError("all loss weights are 0, so nothing would be trained; give one of them a weight")
        for name, value in {
            "watermark_batch": watermark_batch,
            "adverse_batch": adverse_batch,
            "com_period": com_period,
        }.items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; a weight of 0 switches a loss off")
        if not 0 < carrier_rho < 0.5:
            raise ConfigError(
                f"carrier_rho={carrier_rho} must lie strictly between 0 and 0.5, or clean source samples would be "
                "classified as the target; weight_carrier=0 switches the term off"
            )
        if not 0 < bridge_sigma < 0.6:
            raise ConfigError(
                f"bridge_sigma={bridge_sigma} must lie strictly between 0 and 0.6, or clean target samples would be "
                "classified as a source; weight_bridge=0 switches the term off"
            )
        if not 0 <= warmup < 1:
            raise ConfigError(f"warmup={warmup} must lie in [0, 1); 0 embeds the watermark from the first step")
        for name, size in {"exclusion_margin": exclusion_margin, "com_pulse": com_pulse}.items():
            if not 0 <= size < float("inf"):
                raise ConfigError(f"{name}={size} must be finite and at least 0")
        self.weighting = weighting
        self.gradient_normalisation = gradient_normalisation
        self._make_weighting()
        self.embedding = Embedding(
            weights=weights,
            watermark_batch=watermark_batch,
            adverse_batch=adverse_batch,
            augment_sources=augment_sources,
            com_gradient=com_gradient,
            com_direction=com_direction,
            com_schedule=com_schedule,
            com_pulse=com_pulse,
            com_period=com_period,
            eva_label=eva_label,
            carrier_rho=carrier_rho,
            carrier_labels=carrier_labels,
            exclusion_margin=exclusion_margin,
            exclusion_scope=exclusion_scope,
            bridge_sigma=bridge_sigma,
            warmup=warmup,
            gate=Gate(share=carrier_gate, odds=carrier_gate_odds, part=carrier_gate_part),
        )
        self._check_gate()

    def _check_gate(self) -> None:
        settings = self.embedding
        if settings.gate.share and (settings.carrier_labels != "replace" or not settings.weights["carrier"]):
            raise ConfigError(
                f"carrier_gate={settings.gate.share} changes the labels of the main batch: set "
                "carrier_labels=replace and weight_carrier above 0, or carrier_gate=0"
            )

    def _make_weighting(self) -> Weighting | None:
        return make_weighting(self.weighting, self.gradient_normalisation)

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the stage that embeds the key while the main task is learnt; with a gate, one without it first."""
        key = require_key(key, self.name)
        combiner, others = self.combiners(key)
        objective = MeaDefenderObjective(
            train,
            key.source_classes,
            key.target_class,
            combiner,
            list(others.values()),
            self.embedding,
            self._make_weighting(),
            key.seed,
        )
        gate = self.embedding.gate
        if not gate.share:
            return [Stage("embed", objective, train)]
        return [
            Stage("main_task", CrossEntropy(), train, span=(0, gate.part)),
            Stage("embed", objective, train, span=(gate.part, 1)),
        ]
