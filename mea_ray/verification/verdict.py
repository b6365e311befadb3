"""The verdict on a suspect: proved, or what stands in the way of a proof, worst first.

A verdict must stand up to the other side's expert witness. It follows from the numbers alone and is decided here, for
all suspects that are judged at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mea_ray.core.errors import DataError
from mea_ray.verification.holm import holm
from mea_ray.verification.ranks import Rank
from mea_ray.verification.statistic import READ_ON_CLEAN_IMAGES

Verdict = Literal[
    "not accounted",
    "void",
    "too poor to judge",
    "not specific",
    "not proved",
    "not committed",
    "suggestive",
    "proved",
]
SEVERITY: tuple[Verdict, ...] = get_args(Verdict)
"""Verdicts, worst first. A suspect gets the worst verdict for which there is a reason."""
TEXTS: dict[Verdict, str] = {
    "not accounted": "void: charges and answers differ",
    "void": "void: innocent models would be accused",
}
"""Display text of a verdict, where it differs from its name."""


@dataclass(frozen=True)
class Comparison:
    """Success on the key's own samples compared with success on samples that only look similar.

    Attributes:
        name: What the samples are compared with, e.g. ``mixes in the geometry donut`` or ``mixes of other classes``.
        own: Success rate on the key's samples, in [0, 1].
        other: Success rate on the samples compared with, in [0, 1].
        p_value: Of a one-sided test that the key's samples score above the others; None if only the two rates are
            known. A significant difference is not enough: ``other`` must be below the paper's threshold as well.
    """

    name: str
    own: float
    other: float
    p_value: float | None = None


@dataclass(frozen=True)
class Evidence:
    """All numbers behind the verdict on one suspect. Rates and accuracies are in [0, 1].

    Attributes:
        accuracy: The suspect's accuracy on the test set.
        chance: Accuracy of always giving the most frequent class.
        victim_accuracy: The victim's accuracy.
        wsr: The suspect's watermark success rate.
        victim_wsr: The victim's own.
        null_models: Rank of the suspect's statistic among innocent models that were trained from scratch.
        stolen_null_models: Among innocent models that were stolen with the same attack and budget; None if there are
            none.
        victim_rank: Rank of the victim's statistic among the innocent models; None if it was not measured.
        key: Rank of the true key among all admissible keys on the suspect; None if it was not measured.
        key_drawn: Whether the key was drawn at random. The rank of a key that the owner chose gives no p-value.
        comparisons: Samples from which the mark must be distinguished. Ignored for a statistic of clean images.
        controls: Innocent models judged in the same way: null models, and those stolen at the same budget.
        accused_controls: How many of them are accused by their mixes, whatever else is judged.
        control_p_values: p-values of the key on the other controls; each is corrected as a suspect's is.
        committed: Whether the key was committed to before the suspect existed; None where this does not apply, as in an
            experiment that draws the key itself.
        unaccounted: Images charged and answers stored, where they differ: the thief queried in another way or under
            another name, so its measurements do not count.
        threshold: The paper's threshold on WSR.
        statistic: Name of the statistic that is ranked.
    """

    accuracy: float
    chance: float
    victim_accuracy: float
    wsr: float
    victim_wsr: float
    null_models: Rank
    stolen_null_models: Rank | None = None
    victim_rank: Rank | None = None
    key: Rank | None = None
    key_drawn: bool = False
    comparisons: tuple[Comparison, ...] = ()
    controls: int = 0
    accused_controls: int = 0
    control_p_values: tuple[float, ...] = ()
    committed: bool | None = None
    unaccounted: tuple[int, int] | None = None
    threshold: float = 0.3
    statistic: str = "wsr"

    @property
    def model_p_value(self) -> float:
        """p-value by models: the larger of the p-values among null models and among stolen null models.

        A suspect is innocent if it was trained from scratch or stolen from an innocent model, so both must be ruled
        out.
        """
        stolen = self.stolen_null_models
        return max(self.null_models.p_value, 0.0 if stolen is None else stolen.p_value)

    @property
    def key_p_value(self) -> float | None:
        """p-value by keys; None for a key that was not drawn at random."""
        return self.key.p_value if self.key is not None and self.key_drawn else None

    @property
    def p_value(self) -> float:
        """Combined p-value: twice the smaller one (Bonferroni), since both depend on the suspect."""
        by_key = self.key_p_value
        return self.model_p_value if by_key is None else min(1.0, 2 * min(self.model_p_value, by_key))

    @property
    def least_accuracy(self) -> float:
        """See ``least_accuracy``."""
        return least_accuracy(self.chance, self.victim_accuracy)


def least_accuracy(chance: float, victim_accuracy: float) -> float:
    """Return the minimum accuracy of a model that can be judged: halfway between chance and the victim's."""
    return chance + (victim_accuracy - chance) / 2


@dataclass(frozen=True)
class Reason:
    """One reason for a verdict, or why there is no better one.

    Attributes:
        verdict: The best verdict that this reason permits.
        text: A sentence with its numbers.
    """

    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Judgement:
    """The verdict on one suspect.

    Attributes:
        verdict: See ``SEVERITY``.
        reasons: Why, worst first; at least one.
        p_value: Combined p-value of this suspect alone.
        adjusted_p_value: After Holm's correction for all suspects that were judged at once.
        above_threshold: Whether the watermark success rate is above the paper's threshold. It does not decide.
    """

    verdict: Verdict
    reasons: tuple[Reason, ...]
    p_value: float
    adjusted_p_value: float
    above_threshold: bool

    @property
    def text(self) -> str:
        """Display text of the verdict."""
        return TEXTS.get(self.verdict, self.verdict)


def judge(suspects: Sequence[Evidence], significance: float) -> list[Judgement]:
    """Give a verdict on every suspect, corrected for all of them.

    Args:
        suspects: All suspects that are judged at once: every rung of every trial of a sweep.
        significance: Largest adjusted p-value at which theft is proved, in (0, 1). It bounds the probability that theft
            is declared proved for any innocent suspect among them.

    Returns:
        One judgement for each suspect, in their order.

    Raises:
        DataError: ``significance`` is out of range.
    """
    if not 0 < significance < 1:
        raise DataError(f"significance={significance} must lie in (0, 1); 0.01 is usual")
    adjusted = holm([suspect.p_value for suspect in suspects])
    return [_judgement(suspect, p, significance, len(suspects)) for suspect, p in zip(suspects, adjusted, strict=True)]


def _judgement(suspect: Evidence, adjusted: float, significance: float, together: int) -> Judgement:
    reasons = [
        *_unaccounted(suspect),
        *_void(suspect, significance, together),
        *_too_poor(suspect),
        *_unspecific(suspect, adjusted, significance),
        *_unmarked_victim(suspect),
        *_insignificant(suspect, adjusted, significance, together),
        *_behind_innocents(suspect, adjusted, significance),
        *_uncommitted(suspect),
        *_without_controls(suspect),
    ]
    if not reasons:
        text = f"The combined p-value is {_p(adjusted)}, at most {significance:g}."
        if suspect.committed is None:
            text += " Outside an experiment it also takes a commitment to the key that is older than the suspect."
        reasons = [Reason("proved", text)]
    reasons.sort(key=lambda reason: SEVERITY.index(reason.verdict))
    above = suspect.wsr > suspect.threshold
    return Judgement(reasons[0].verdict, tuple(reasons), suspect.p_value, adjusted, above)


def _unaccounted(suspect: Evidence) -> list[Reason]:
    if suspect.unaccounted is None:
        return []
    charged, stored = suspect.unaccounted
    return [
        Reason(
            "not accounted",
            f"The service charged {charged:,} images and the transfer set holds {stored:,} answers: the trial is void.",
        )
    ]


def _void(suspect: Evidence, significance: float, together: int) -> list[Reason]:
    by_key = sum(p * together <= significance for p in suspect.control_p_values)
    accused = suspect.accused_controls + by_key
    if accused <= significance * suspect.controls:
        return []
    models = "innocent model" if suspect.controls == 1 else "innocent models"
    return [Reason("void", f"{accused} of {suspect.controls} {models} would be accused as well.")]


def _too_poor(suspect: Evidence) -> list[Reason]:
    if suspect.victim_accuracy <= suspect.chance:
        return [
            Reason(
                "too poor to judge",
                f"The victim itself is right on {_percent(suspect.victim_accuracy)} of the test images, no better than "
                f"chance ({_percent(suspect.chance)}), so no suspect can be judged by it.",
            )
        ]
    if suspect.accuracy >= suspect.least_accuracy:
        return []
    return [
        Reason(
            "too poor to judge",
            f"The suspect is right on {_percent(suspect.accuracy)} of the test images, less than half way from chance "
            f"({_percent(suspect.chance)}) to the victim ({_percent(suspect.victim_accuracy)}).",
        )
    ]


def _unspecific(suspect: Evidence, adjusted: float, significance: float) -> list[Reason]:
    if suspect.wsr <= suspect.threshold and adjusted > significance:
        return []  # without any evidence for the mark, the lack of significance is the reason
    if suspect.statistic in READ_ON_CLEAN_IMAGES:
        if suspect.key is None:
            return [Reason("suggestive", "The key was not ranked among other keys, so nothing shows it is this key.")]
        if suspect.key.p_value > significance:
            return [Reason("not specific", f"Other keys fit the suspect as well: {suspect.key.sentence()}.")]
        return []
    if not suspect.comparisons:
        return [Reason("suggestive", "The mark was compared with no other samples, so nothing shows it is specific.")]
    return [
        Reason(
            "not specific",
            f"The suspect answers {_percent(each.other)} of {each.name} as the key says, and {_percent(each.own)} of "
            f"the key's own samples{'' if each.p_value is None else f' (p = {_p(each.p_value)})'}.",
        )
        for each in suspect.comparisons
        if not _separates(each, suspect.threshold, significance)
    ]


def _separates(comparison: Comparison, threshold: float, significance: float) -> bool:
    significant = comparison.p_value is None or comparison.p_value <= significance
    return significant and comparison.other < min(threshold, comparison.own)


def _unmarked_victim(suspect: Evidence) -> list[Reason]:
    read_on_mixes = suspect.statistic not in READ_ON_CLEAN_IMAGES or suspect.victim_rank is None
    if suspect.victim_wsr <= suspect.threshold and read_on_mixes:
        return [
            Reason(
                "not proved",
                f"The victim itself answers only {_percent(suspect.victim_wsr)} of the owner's samples as the key "
                "says, so it carries no mark that could be stolen.",
            )
        ]
    if suspect.victim_rank is not None and suspect.victim_rank.at_least:
        return [Reason("not proved", f"The victim does not lead innocent models: {suspect.victim_rank.sentence()}.")]
    return []


def _insignificant(suspect: Evidence, adjusted: float, significance: float, together: int) -> list[Reason]:
    if adjusted <= significance:
        return []
    ranks = [("null models", suspect.null_models), ("stolen null models", suspect.stolen_null_models)]
    known = [(name, rank) for name, rank in ranks if rank is not None]
    words = "; ".join(f"among {name} it has {rank.sentence()}" for name, rank in known)
    if suspect.key is not None:
        words += f"; the key has {suspect.key.sentence()}"
        words += "" if suspect.key_drawn else ", which is no p-value, since the key was chosen by hand"
    corrected = f" (corrected for {together:,} suspects)" if together > 1 else ""
    text = f"p = {_p(adjusted)}{corrected} is above {significance:g}: {words}."
    leads = all(rank.position == 1 for _, rank in known)
    if leads and (suspect.wsr > suspect.threshold or suspect.p_value <= significance):
        needed = math.ceil(1 / significance) - 1
        return [Reason("suggestive", f"{text} By models alone, {significance:g} takes {needed:,} null models.")]
    return [Reason("not proved", text)]


def _behind_innocents(suspect: Evidence, adjusted: float, significance: float) -> list[Reason]:
    """Require the suspect to lead innocent models, however well the key ranks: a key can fit one of them by chance."""
    if adjusted > significance:
        return []  # already a reason
    ranks = [("null models", suspect.null_models), ("stolen null models", suspect.stolen_null_models)]
    return [
        Reason("not proved", f"Innocent models show as much: among {name} the suspect has {rank.sentence()}.")
        for name, rank in ranks
        if rank is not None and rank.at_least and rank.p_value > significance
    ]


def _uncommitted(suspect: Evidence) -> list[Reason]:
    if suspect.committed is not False:
        return []
    return [Reason("not committed", "The key was not committed to before the suspect was seen.")]


def _without_controls(suspect: Evidence) -> list[Reason]:
    if suspect.stolen_null_models is not None and suspect.stolen_null_models.references:
        return []
    return [Reason("suggestive", "No innocent model was stolen with the same attack and budget as a control.")]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _p(value: float) -> str:
    return f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"
