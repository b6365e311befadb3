"""What the trials say, in plain sentences: the first thing that a reader of the report meets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mea_ray.report.tables import Tone, grouped, mean, percent, tone_of
from mea_ray.results.points import setting
from mea_ray.results.records import ModelReport, RemovalResult, RungResult, TrialResult
from mea_ray.verification import evidence
from mea_ray.verification.verdict import SEVERITY, Judgement, Verdict

Judgements = Mapping[tuple[str, int], Judgement]
HEADLINES: dict[Verdict, str] = {
    "void": "Nothing is proved: innocent models would be accused as well.",
    "too poor to judge": "Nothing is proved: {models} too poor to judge.",
    "not specific": "Nothing is proved: {models} fooled by samples that only look like the owner's.",
    "not proved": "Theft is not proved: {models} not distinguishable from innocent models.",
    "not committed": "Nothing is proved yet: {models} recognised, but nobody can check that the key is older.",
    "suggestive": "The evidence is suggestive, but no proof: {models} recognised, and too little rules out chance.",
    "proved": "Theft is proved: {models} recognised.",
}


@dataclass(frozen=True)
class Finding:
    """One sentence and whether it speaks for the owner's proof (good), against it (bad), or neither (mixed)."""

    text: str
    tone: Tone


def threshold(results: Sequence[TrialResult]) -> float:
    """Return the WSR above which the trials' config calls a model stolen (the paper: 0.3)."""
    return evidence.threshold(results[0])


def significance(results: Sequence[TrialResult]) -> float:
    """Return the largest p-value at which the trials' config claims theft."""
    return evidence.significance(results)


def last_rung(result: TrialResult) -> RungResult | None:
    """Return the rung with the largest budget, or None if the trial was stopped before any."""
    return max(result.rungs, key=lambda rung: rung.budget, default=None)


def headline(results: Sequence[TrialResult]) -> Finding:
    """Answer in one sentence: is theft at the largest budget proved? The worst verdict decides, and its colour."""
    ends = _ends(results, evidence.judge_rungs(results))
    if not ends:
        return Finding("Nothing can be proved: the victims of these trials carry no watermark.", "mixed")
    counts = Counter(judgement.verdict for judgement in ends)
    worst = _worst(ends).verdict
    if len(counts) > 1 and worst != "void":
        others = ", ".join(f"{counts[verdict]} {verdict}" for verdict in SEVERITY if verdict in counts)
        return Finding(f"Of {len(ends)} models stolen at the largest budget: {others}.", tone_of(worst))
    return Finding(HEADLINES[worst].format(models=_models(len(ends))), tone_of(worst))


def _models(count: int) -> str:
    if count == 1:
        return "the model stolen at the largest budget is"
    return f"{'both' if count == 2 else f'all {count}'} models stolen at the largest budget are"


def _ends(results: Sequence[TrialResult], judged: Judgements) -> list[Judgement]:
    """Return the judgements on the substitutes of the largest budgets."""
    rungs = [(result.trial, rung.budget) for result in results if (rung := last_rung(result)) is not None]
    return [judged[place] for place in rungs if place in judged]


def _worst(judgements: Sequence[Judgement]) -> Judgement:
    return min(judgements, key=lambda judgement: SEVERITY.index(judgement.verdict))


def findings(results: Sequence[TrialResult]) -> list[Finding]:
    """Return the sentences below the headline: what undoes the proof first, worst first, then what was measured."""
    judged = evidence.judge_rungs(results)
    ends = _ends(results, judged)
    sentences = _reasons(_worst(ends)) if ends else []
    sentences += [*_removal(results), *_cost(results), _victim(results), *_innocent(results)]
    groups = grouped(results)
    for name, trials in groups.items():
        sentence = _theft(name if len(groups) > 1 else "", trials, judged)
        if sentence:
            sentences.append(sentence)
    return sentences


def _reasons(judgement: Judgement) -> list[Finding]:
    """Give the reasons for the worst verdict; of several reasons why a mark is not specific, the first only."""
    unspecific = [reason for reason in judgement.reasons if reason.verdict == "not specific"][1:]
    return [Finding(each.text, tone_of(each.verdict)) for each in judgement.reasons if each not in unspecific]


def _removal(results: Sequence[TrialResult]) -> list[Finding]:
    """Name the removal that took the mark from a stolen model for the least accuracy."""
    limit = threshold(results)
    won = [
        removal
        for result in results
        for removal in result.removals
        if removal.tried_on == "substitute"
        and removal.before.wsr is not None
        and removal.after.wsr is not None
        and removal.before.wsr.rate > limit >= removal.after.wsr.rate
    ]
    tried = [removal for result in results for removal in result.removals if removal.tried_on == "substitute"]
    if not tried:
        return []
    if not won:
        return [Finding(f"No removal of {len(tried)} that were tried takes WSR below {percent(limit, 0)}.", "good")]
    cheapest = min(won, key=_accuracy_lost)
    assert cheapest.after.wsr is not None
    return [
        Finding(
            f"The removal {setting(cheapest.removal)} takes the mark (WSR {percent(cheapest.after.wsr.rate)}) for "
            f"{100 * _accuracy_lost(cheapest):.1f} points of accuracy.",
            "bad",
        )
    ]


def _accuracy_lost(removal: RemovalResult) -> float:
    return removal.before.accuracy - removal.after.accuracy


def _cost(results: Sequence[TrialResult]) -> list[Finding]:
    """Say what the mark costs customers on the source classes, against the null models."""
    lost, blurred = [], []
    for result in results:
        for null in result.null_reports:
            ours, theirs = result.victim_report, null
            common = ours.source_accuracy.keys() & theirs.source_accuracy.keys()
            lost += [100 * (theirs.source_accuracy[name] - ours.source_accuracy[name]) for name in common]
            if ours.calibration_error is not None and theirs.calibration_error is not None:
                blurred.append(ours.calibration_error - theirs.calibration_error)
    points, calibration = mean(lost), mean(blurred)
    if points is None or calibration is None:
        return []
    noticeable = points > 1 or calibration > 0.05
    return [
        Finding(
            f"The mark costs customers {points:.1f} points of accuracy on the source classes and {calibration:+.3f} "
            "of calibration error.",
            "mixed" if noticeable else "good",
        )
    ]


def _all_innocent(results: Sequence[TrialResult]) -> list[tuple[TrialResult, ModelReport]]:
    nulls = [(result, report) for result in results for report in result.null_reports]
    return nulls + [(result, rung.report) for result in results for rung in result.stolen_nulls]


def _victim(results: Sequence[TrialResult]) -> Finding:
    wsr = mean([r.victim_report.wsr.rate if r.victim_report.wsr else None for r in results])
    accuracy = mean([r.victim_report.accuracy for r in results])
    null = mean([n.accuracy for r in results for n in r.null_reports])
    text = f"The victim's accuracy is {percent(accuracy)}"
    if accuracy is not None and null is not None:
        points = 100 * (accuracy - null)
        text += f", {abs(points):.1f} points {'below' if points < 0 else 'above'} an innocent model's"
    if wsr is None:
        return Finding(text + "; it carries no watermark.", "mixed")
    good = wsr >= 0.9 and (null is None or accuracy is None or accuracy >= null - 0.02)
    return Finding(
        f"{text}; it answers {percent(wsr)} of the owner's watermark samples as the key says.",
        "good" if good else "mixed",
    )


def _innocent(results: Sequence[TrialResult]) -> list[Finding]:
    rates = [n.wsr.rate for r in results for n in r.null_reports if n.wsr is not None]
    if not rates:
        return []
    innocent = _all_innocent(results)
    accused = sum(evidence.accused(result, report) for result, report in innocent)
    text = f"Innocent models do so on {percent(mean(rates))} (at most {percent(max(rates))})"
    stolen = [c.report.wsr.rate for r in results for c in r.stolen_nulls if c.report.wsr is not None]
    if stolen:
        text += f", substitutes of innocent models on {percent(mean(stolen))} (at most {percent(max(stolen))})"
    limit = percent(threshold(results), 0)
    text += f"; the paper's threshold of {limit} accuses {accused} of {len(innocent)}"
    return [Finding(f"{text}.", "bad" if accused else "good")]


def _theft(name: str, trials: Sequence[TrialResult], judged: Judgements) -> Finding | None:
    """Say what a group's substitutes reach at the largest budget, and the verdict at each budget."""
    ends = [rung for rung in map(last_rung, trials) if rung is not None]
    wsr = mean([rung.report.wsr.rate if rung.report.wsr else None for rung in ends])
    if not ends or wsr is None:
        return None
    by_budget: dict[int, list[Judgement]] = {}
    for trial in trials:
        for rung in sorted(trial.rungs, key=lambda each: each.budget):
            if (trial.trial, rung.budget) in judged:
                by_budget.setdefault(rung.budget, []).append(judged[trial.trial, rung.budget])
    verdicts = {budget: _worst(found) for budget, found in sorted(by_budget.items())}
    listed = "; ".join(f"{budget:,} queries: {judgement.verdict}" for budget, judgement in verdicts.items())
    above = "above" if wsr > threshold(trials) else "not above"
    text = (
        f"{name + ': a' if name else 'A'} substitute bought with {max(verdicts, default=ends[-1].budget):,} queries "
        f"reaches {percent(mean([rung.report.accuracy for rung in ends]))} accuracy and carries the watermark with WSR "
        f"{percent(wsr)}, {above} the paper's threshold. Verdicts: {listed or 'none, for want of null models'}."
    )
    return Finding(text, tone_of(list(verdicts.values())[-1].verdict) if verdicts else "mixed")
