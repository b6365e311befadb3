"""What the trials say, in plain sentences: the first thing that a reader of the report meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mea_ray.report.tables import grouped, mean, percent
from mea_ray.results.records import ModelReport, RungResult, TrialResult

Tone = Literal["good", "mixed", "bad"]


@dataclass(frozen=True)
class Finding:
    """One sentence and whether it speaks for the owner's proof (good), against it (bad), or neither (mixed)."""

    text: str
    tone: Tone


def threshold(results: Sequence[TrialResult]) -> float:
    """Return the WSR above which the trials' config calls a model stolen (the paper: 0.3)."""
    return float(results[0].config.get("verification", {}).get("threshold", 0.3))


def significance(results: Sequence[TrialResult]) -> float:
    """Return the largest p-value at which the trials' config claims theft."""
    return float(results[0].config.get("verification", {}).get("significance", 0.01))


def last_rung(result: TrialResult) -> RungResult | None:
    """Return the rung with the largest budget, or None if the trial was stopped before any."""
    return max(result.rungs, key=lambda rung: rung.budget, default=None)


def headline(results: Sequence[TrialResult]) -> Finding:
    """Answer the question of the whole program in one sentence: is theft at the largest budget proved?"""
    ends = [rung for rung in map(last_rung, results) if rung is not None and rung.report.wsr is not None]
    if not ends:
        return Finding("Nothing can be proved: the victims of these trials carry no watermark.", "mixed")
    if guilty_nulls(results):
        return Finding("Nothing is proved: an innocent model would be accused too.", "bad")
    count = sum(rung.report.proved for rung in ends)
    if count == len(ends):
        many = "both" if count == 2 else f"all {count}"
        models = "the stolen model is" if count == 1 else f"{many} stolen models are"
        return Finding(f"Theft is proved: at the largest budget {models} recognised.", "good")
    if count == 0:
        models = "the stolen model is not" if len(ends) == 1 else f"none of the {len(ends)} stolen models is"
        return Finding(f"Theft is not proved: at the largest budget {models} recognised.", "bad")
    return Finding(f"Theft is proved for {count} of {len(ends)} stolen models at their largest budget.", "mixed")


def guilty_nulls(results: Sequence[TrialResult]) -> int:
    """Count the innocent models, over all trials, whose WSR is above the threshold: null models and thieves of them."""
    limit = threshold(results)
    return sum(report.wsr is not None and report.wsr.rate > limit for report in _all_innocent(results))


def _all_innocent(results: Sequence[TrialResult]) -> list[ModelReport]:
    nulls = [report for result in results for report in result.null_reports]
    return nulls + [rung.report for result in results for rung in result.stolen_nulls]


def findings(results: Sequence[TrialResult]) -> list[Finding]:
    """Return the sentences below the headline: victim, price, innocent models, thefts, and what to distrust."""
    sentences = [_victim(results), *_innocent(results)]
    for name, trials in grouped(results).items():
        sentence = _theft(name if len(grouped(results)) > 1 else "", trials)
        if sentence:
            sentences.append(sentence)
    sentences += _unspecific(results)
    return sentences


def _unspecific(results: Sequence[TrialResult]) -> list[Finding]:
    """Say for which groups the watermark succeeds on the wrong mixes, too: mixed otherwise, or of other classes."""
    groups = grouped(results)
    bad: dict[str, float] = {}
    for name, trials in groups.items():
        ends = [rung.report for trial in trials if (rung := last_rung(trial)) is not None]
        geometries = mean([report.wfpr_mean for report in ends])
        classes = mean([report.wfpr_classes.rate if report.wfpr_classes else None for report in ends])
        rate = max(geometries or 0.0, classes or 0.0)
        if rate >= threshold(results):
            bad[name] = rate
    if not bad:
        return []
    where = f" for {', '.join(bad)}" if len(groups) > 1 else ""
    return [
        Finding(
            f"The mark is not specific{where}: stolen models answer {percent(max(bad.values()))} of what only looks "
            "like the owner's samples as the key says, too, so the secret adds little to the proof.",
            "bad",
        )
    ]


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
    bad = guilty_nulls(results) > 0
    text = f"Innocent models do so on {percent(mean(rates))} (at most {percent(max(rates))})"
    stolen = [c.report.wsr.rate for r in results for c in r.stolen_nulls if c.report.wsr is not None]
    if stolen:
        text += f", substitutes of innocent models on {percent(mean(stolen))} (at most {percent(max(stolen))})"
    limit = percent(threshold(results), 0)
    return [Finding(f"{text}, {'above' if bad else 'below'} the threshold of {limit}.", "bad" if bad else "good")]


def _theft(name: str, trials: Sequence[TrialResult]) -> Finding | None:
    ends = [rung for rung in map(last_rung, trials) if rung is not None]
    wsr = mean([rung.report.wsr.rate if rung.report.wsr else None for rung in ends])
    if not ends or wsr is None:
        return None
    budget = max(rung.budget for rung in ends)
    accuracy = mean([rung.report.accuracy for rung in ends])
    first = _first_proved(trials)
    text = (
        f"{name + ': a' if name else 'A'} substitute bought with {budget:,} queries reaches {percent(accuracy)} "
        f"accuracy and carries the watermark with WSR {percent(wsr)}; "
    )
    if first is None:
        return Finding(text + "its theft is proved at no budget tried.", "bad")
    tone: Tone = "good" if all(rung.report.proved for rung in ends) else "mixed"
    every = "in every trial" if len(trials) > 1 else ""
    return Finding(f"{text}theft is proved {every + ' ' if every else ''}from {first:,} queries on.", tone)


def _first_proved(trials: Sequence[TrialResult]) -> int | None:
    """Return the smallest budget from which on every trial's every rung is proved."""
    budgets = sorted({rung.budget for trial in trials for rung in trial.rungs})
    first = None
    for budget in reversed(budgets):
        if not all(rung.report.proved for trial in trials for rung in trial.rungs if rung.budget == budget):
            break
        first = budget
    return first
