"""Rehearsal: beside the victim, simulated thieves learn from its answers; it answers so that they learn the mark."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mea_ray.core.class_label import ClassLabel
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks.base import Key, Stage, require_key
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.mixing import Mixing
from mea_ray.watermarks.rehearsal.objective import RehearsalObjective
from mea_ray.watermarks.rehearsal.settings import Budget, RehearsalSettings, Specificity, Thieves, Unseen


class Rehearsal(MixedClasses):
    """The victim's answers to clean images are chosen so that a thief's next step brings mixes closer to the target.

    Choose it for a mark that is fitted to how thieves learn, at many times the cost of training.

    First the main task alone is learnt; that model's answers are the unmarked ones. Then simulated thieves learn from
    the victim's answers while it is trained. For a thief q let L be its loss on mixes: cross-entropy with the target,
    and ``specificity`` on mixes of other classes. A step of the thief on the answer p(x) changes L, to first order, by
    the learning rate times sum_k p_k(x) s_k(x), where s_k(x) is the derivative of log q_k(x) along the gradient of L:
    one pass in forward mode. The victim minimises this sum, s centred under p and scaled to mean size 1, on the images
    of the main batch. ``budget`` bounds how far an answer may move from the unmarked one, and keeps its class;
    ``unseen`` bounds what an outsider could read from the answers.

    T2S takes the loss of a simulated stolen model on a trigger set as the signal; only its abstract was at hand. The
    forward-mode pass in place of an unrolled training, the budget, the specificity and the penalty on the lean are this
    project's. ADBA trains victim and thief in turns, as here.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label that thieves are to give to a mix.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.
        weight: Weight of the rehearsal.
        ver: Weight of the cross-entropy of mixes with the target in the victim itself. 0 leaves the victim unmarked on
            mixes: only answers to clean images carry the mark.
        thieves: The simulated thieves.
        budget: How far answers may move.
        specificity: What keeps other mixes away from the target.
        unseen: What keeps the lean small.
        mixes: Mixes of each kind in a step.
        part: Part of the epochs that learn the main task alone.

    References:
        Mei et al., T2S: A Rehearsal-Based Approach for Extraction-Resistant Model Watermarking, 2026,
        https://arxiv.org/abs/2606.11698; Ge et al., Anti-Distillation Backdoor Attacks, ACM Multimedia 2021.

    Raises:
        ConfigError: Classes coincide, or a geometry makes the combiner's own mixes.
    """

    name = "rehearsal"
    statistic = "lean"

    def __init__(
        self,
        *,
        source_classes: tuple[ClassLabel, ClassLabel] = (0, 1),
        target_class: ClassLabel = 2,
        mixing: Mixing = Mixing(),
        key: KeyDraw = KeyDraw(),
        weight: Annotated[float, Field(gt=0)] = 0.3,
        ver: Annotated[float, Field(ge=0)] = 0.3,
        thieves: Thieves = Thieves(),
        budget: Budget = Budget(),
        specificity: Specificity = Specificity(),
        unseen: Unseen = Unseen(),
        mixes: Annotated[int, Field(ge=2)] = 32,
        part: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    ) -> None:
        super().__init__(source_classes, target_class, mixing, key)
        self.settings = RehearsalSettings(
            weight=weight,
            ver=ver,
            thieves=thieves,
            budget=budget,
            specificity=specificity,
            unseen=unseen,
            mixes=mixes,
        )
        self.part = part

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return the main task alone, then the rehearsal."""
        key = require_key(key, self.name)
        combiner, _ = self.combiners(key)
        objective = RehearsalObjective(train, (*key.source_classes, key.target_class), combiner, self.settings)
        return [
            Stage("main_task", CrossEntropy(), train, span=(0, self.part)),
            Stage("embed", objective, train, span=(self.part, 1)),
        ]
