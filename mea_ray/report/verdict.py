"""The findings of the trials, as sentences at the top of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mea_ray.report import leakage
from mea_ray.report.tables import (
    Judgements,
    Tone,
    grouped,
    is_many,
    mean,
    percent,
    tone_of,
    with_short_points,
)
from mea_ray.results import numbers
from mea_ray.results.points import label, setting
from mea_ray.results.records import ModelReport, RemovalResult, RungResult, TrialResult
from mea_ray.verification import evidence
from mea_ray.verification.verdict import SEVERITY, Judgement, Verdict

Part = Literal["survived", "undone", "cost"]
PARTS: dict[Part, str] = {"survived": "What survived", "undone": "What undoes it", "cost": "What it cost"}
"""The parts of the first screen, with their headings."""
HEADLINES: dict[Verdict, str] = {
    "not accounted": "Nothing is proved: a thief's charges and answers differ, so its trial is void.",
    "void": "Nothing is proved: innocent models would be accused as well.",
    "too poor to judge": "Nothing is proved: {models} too poor to judge.",
    "not specific": "Nothing is proved: {models} fooled by samples that only look like the owner's.",
    "not proved": "Theft is not proved: {models} not distinguishable from innocent models.",
    "not committed": "Nothing is proved yet: {models} recognised, but nobody can check that the key is older.",
    "suggestive": "The evidence is suggestive, but no proof: {models} recognised, and too little rules out chance.",
    "proved": "Theft is proved: {models} recognised.",
}

PLAIN = "unchanged"
"""``thief.learning.answers`` of a thief who learns from the unchanged answers."""
SCHEMES = 6
"""Maximum number of schemes with separate summaries."""


@dataclass(frozen=True)
class Finding:
    """One sentence, its tone (see ``tables``), and its part of the first screen."""

    text: str
    tone: Tone
    part: Part = "survived"


def threshold(results: Sequence[TrialResult]) -> float:
    """Return the trials' WSR threshold above which a model counts as stolen (0.3 in the paper)."""
    return numbers.threshold(results[0])


def significance(results: Sequence[TrialResult]) -> float:
    """Return the trials' significance level: the largest p-value at which theft is claimed."""
    return evidence.significance(results)


def last_rung(result: TrialResult) -> RungResult | None:
    """Return the rung with the largest budget, or None if the trial was stopped before any."""
    return max(result.rungs, key=lambda rung: rung.budget, default=None)


def headline(results: Sequence[TrialResult], judged: Judgements | None = None) -> Finding:
    """Return in one sentence whether theft at the largest budget is proved, and the colour. The worst verdict decides.

    Args:
        results: The trials.
        judged: Judgements on their substitutes; None judges only these trials.
    """
    ends = _ends(results, evidence.judge_rungs(results) if judged is None else judged)
    if not ends:
        return Finding("Nothing can be proved: the victims of these trials carry no watermark.", "mixed")
    counts = Counter(judgement.verdict for judgement in ends)
    worst = _worst(ends).verdict
    if len(counts) > 1 and worst != "void":
        others = ", ".join(f"{counts[verdict]} {verdict}" for verdict in SEVERITY if verdict in counts)
        return Finding(f"Of {len(ends)} models stolen at the largest budget: {others}.", tone_of(worst))
    return Finding(HEADLINES[worst].format(models=_models(len(ends))), tone_of(worst))


@dataclass(frozen=True)
class Summary:
    """The first screen of one watermark scheme.

    Attributes:
        scheme: Its name; empty where all trials have the same scheme.
        headline: See ``headline``.
        findings: See ``findings``.
    """

    scheme: str
    headline: Finding
    findings: list[Finding]

    @property
    def parts(self) -> list[tuple[str, list[Finding]]]:
        """The findings by ``PARTS``, each with its heading; empty parts are omitted."""
        groups = [(PARTS[part], [each for each in self.findings if each.part == part]) for part in PARTS]
        return [(heading, own) for heading, own in groups if own]


def summaries(results: Sequence[TrialResult], judged: Judgements | None = None) -> list[Summary]:
    """Return the first screen: one summary for each watermark scheme, in the order of first appearance.

    Sweeps over more than ``SCHEMES`` of them have a single summary. All trials are judged at once in either case.

    Args:
        results: The trials.
        judged: Judgements on their substitutes, of the whole sweep; None judges only these trials.
    """
    results = with_short_points(results)
    judged = evidence.judge_rungs(results) if judged is None else judged
    schemes: dict[str, list[TrialResult]] = {}
    for result in results:
        schemes.setdefault(_scheme(result), []).append(result)
    if not 1 < len(schemes) <= SCHEMES:
        schemes = {"": list(results)}
    return [Summary(name, headline(own, judged), findings(own, judged)) for name, own in schemes.items()]


def _scheme(result: TrialResult) -> str:
    """Return the name of a trial's watermark scheme, with the settings of it that the sweep varies as a whole."""
    if (swept := result.point.get("victim.watermark")) is not None:
        return setting(swept)
    return str(result.config.get("victim", {}).get("watermark", {}).get("name", ""))


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


def findings(results: Sequence[TrialResult], judged: Judgements | None = None) -> list[Finding]:
    """Return the sentences below the headline: first what undermines the proof, worst first, then the measurements.

    Args:
        results: The trials.
        judged: Judgements on their substitutes; None judges only these trials.
    """
    judged = evidence.judge_rungs(results) if judged is None else judged
    groups = _named_groups(results)
    sentences = _reasons(groups, judged)
    sentences += [*_removal(results), *_cleaning(results, judged), *_given_away(results), *_cost(results)]
    sentences += [_victim(results), *_innocent(results), *_magnitude(results)]
    if is_many(results):
        return [*sentences, *_thefts(groups, judged), *_paper(results)]
    for name, trials in groups.items():
        sentence = _theft(name if len(groups) > 1 else "", trials, judged)
        if sentence:
            sentences.append(sentence)
    return [*sentences, *_paper(results)]


def _thefts(groups: Mapping[str, Sequence[TrialResult]], judged: Judgements) -> list[Finding]:
    """Describe the substitutes of a sweep of many points: means, and where WSR is highest and lowest."""
    wsr: dict[str, float] = {}
    accuracy = []
    for name, trials in groups.items():
        ends = [rung for rung in map(last_rung, trials) if rung is not None]
        own = mean([rung.report.wsr.rate if rung.report.wsr else None for rung in ends])
        if own is not None:
            wsr[name] = own
            accuracy += [rung.report.accuracy for rung in ends]
    if not wsr:
        return []
    verdicts = [each.verdict for trials in groups.values() for each in _ends(trials, judged)]
    proved = verdicts.count("proved")
    highest, lowest = max(wsr, key=wsr.__getitem__), min(wsr, key=wsr.__getitem__)
    text = (
        f"Over {len(wsr):,} points, substitutes reach {percent(mean(accuracy))} accuracy and a WSR of "
        f"{percent(mean(list(wsr.values())))} on average: {percent(wsr[highest])} at {highest}, "
        f"{percent(wsr[lowest])} at {lowest}. Theft is proved for {proved:,} of {len(verdicts):,} models."
    )
    return [Finding(text, "good" if verdicts and proved == len(verdicts) else "mixed" if proved else "bad")]


def _named_groups(results: Sequence[TrialResult]) -> dict[str, list[TrialResult]]:
    """Group trials that differ only in their seeds; names omit the settings that all trials share."""
    groups = grouped(results)
    points = [trials[0].point for trials in groups.values()]
    shared = [path for path in points[0] if all(path in point and point[path] == points[0][path] for point in points)]
    names = [label({path: value for path, value in point.items() if path not in shared}) for point in points]
    return dict(zip(names, groups.values(), strict=True))


def _reasons(groups: Mapping[str, Sequence[TrialResult]], judged: Judgements) -> list[Finding]:
    """Give the reasons for the worst verdict; of several reasons why a mark is not specific, only the first."""
    ends = {name: _ends(trials, judged) for name, trials in groups.items()}
    worst = {name: _worst(all_findings) for name, all_findings in ends.items() if all_findings}
    if not worst:
        return []
    name = min(worst, key=lambda each: SEVERITY.index(worst[each].verdict))
    judgement = worst[name]
    unspecific = [reason for reason in judgement.reasons if reason.verdict == "not specific"][1:]
    reasons = [each for each in judgement.reasons if each not in unspecific]
    where = f"At {name}: " if len(worst) > 1 else ""
    return [Finding(where + each.text, tone_of(each.verdict), "undone") for each in reasons]


def _removal(results: Sequence[TrialResult]) -> list[Finding]:
    """Name the removal that removed the mark from a stolen model at the smallest loss of accuracy."""
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
        none = "The removal does not bring" if len(tried) == 1 else f"None of the {len(tried)} removals brings"
        return [Finding(f"{none} WSR below {percent(limit, 0)}.", "good", "survived")]
    cheapest = min(won, key=_accuracy_lost)
    assert cheapest.after.wsr is not None
    return [
        Finding(
            f"The removal {setting(cheapest.removal)} removes the mark (WSR {percent(cheapest.after.wsr.rate)}) for "
            f"{100 * _accuracy_lost(cheapest):.1f} points of accuracy.",
            "bad",
            "undone",
        )
    ]


def _cleaning(results: Sequence[TrialResult], judged: Judgements) -> list[Finding]:
    """Compare thieves who changed the answers with one who did not; worst first."""
    thieves: dict[str, list[tuple[RungResult, Judgement]]] = {}
    for result in results:
        rung = last_rung(result)
        if rung is not None and rung.report.wsr is not None and (result.trial, rung.budget) in judged:
            learning = result.config.get("thief", {}).get("learning", {})
            how = str(learning.get("answers", PLAIN))
            thieves.setdefault(how, []).append((rung, judged[result.trial, rung.budget]))
    plain = thieves.pop(PLAIN, [])
    if not plain:
        return []
    cleanings = [_cleaned(how, plain, thief, threshold(results)) for how, thief in thieves.items()]
    return sorted(cleanings, key=lambda each: ("bad", "mixed", "good").index(each.tone))


def _cleaned(
    how: str, plain: Sequence[tuple[RungResult, Judgement]], thief: Sequence[tuple[RungResult, Judgement]], limit: float
) -> Finding:
    """Compare a thief who changed the answers with one who did not."""
    before, after = (
        mean([rung.report.wsr.rate for rung, _ in each if rung.report.wsr]) or 0.0 for each in (plain, thief)
    )
    accuracy, cleaned = (mean([rung.report.accuracy for rung, _ in each]) or 0.0 for each in (plain, thief))
    was, is_now = (_worst([judgement for _, judgement in each]) for each in (plain, thief))
    text = f"A thief who changes the answers ({how}), which costs no query, ends with a WSR of {percent(after)} "
    text += f"instead of {percent(before)}, and with {percent(cleaned)} accuracy instead of {percent(accuracy)}; "
    if was.verdict == is_now.verdict:
        text += f"the verdict is {is_now.text} in both cases."
    else:
        text += f"the verdict is {is_now.text} instead of {was.text}."
    if "proved" in (was.verdict, is_now.verdict):
        return Finding(text, "good") if is_now.verdict == "proved" else Finding(text, "bad", "undone")
    if before <= limit:
        return Finding(text, "mixed", "undone")
    return Finding(text, "bad", "undone") if after <= limit else Finding(text, "good")


def _accuracy_lost(removal: RemovalResult) -> float:
    return removal.before.accuracy - removal.after.accuracy


def _cost(results: Sequence[TrialResult]) -> list[Finding]:
    """Say what the mark costs customers on the source classes (or on all), compared with the null models."""
    lost, blurred = [], []
    for result in results:
        for null in result.null_reports:
            ours, theirs = result.victim_report, null
            common = ours.source_accuracy.keys() & theirs.source_accuracy.keys()
            lost += [100 * (theirs.source_accuracy[name] - ours.source_accuracy[name]) for name in common]
            if ours.calibration_error is not None and theirs.calibration_error is not None:
                blurred.append(ours.calibration_error - theirs.calibration_error)
    points, calibration = mean(lost), mean(blurred)
    if calibration is None:
        return []
    error = f"adds {calibration:.3f} to the calibration error"
    if calibration < 0.0005:
        error = "does not raise the calibration error"
    if points is None:  # a scheme without source classes
        text = f"The mark {error}."
    else:
        accuracy = f"{points:.1f} points of accuracy" if points >= 0.05 else "no accuracy"
        text = f"The mark costs customers {accuracy} on the source classes and {error}."
    return [Finding(text, "mixed" if (points or 0) > 1 or calibration > 0.05 else "good", "cost")]


def _given_away(results: Sequence[TrialResult]) -> list[Finding]:
    """Say what the answers give away; for several victims, the one that gives away most."""
    findings = [Finding(*sentence, "undone") for sentence in map(leakage.sentence, results) if sentence is not None]
    return findings if not findings else [min(findings, key=lambda each: ("bad", "mixed", "good").index(each.tone))]


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
    text = f"Innocent models do so on {percent(mean(rates))} (at most {percent(max(rates))})"
    stolen = [c.report.wsr.rate for r in results for c in r.stolen_nulls if c.report.wsr is not None]
    if stolen:
        text += f", substitutes of innocent models on {percent(mean(stolen))} (at most {percent(max(stolen))})"
    accused = any(evidence.accused(result, report) for result, report in _all_innocent(results))
    return [Finding(f"{text}.", "bad" if accused else "good")]


def _paper(results: Sequence[TrialResult]) -> list[Finding]:
    """Describe the paper's rule separately: it does not decide here."""
    ends = [rung.report.wsr.rate for rung in map(last_rung, results) if rung is not None and rung.report.wsr]
    innocent = _all_innocent(results)
    if not ends or not innocent:
        return []
    limit = threshold(results)
    above = sum(rate > limit for rate in ends)
    accused = sum(report.wsr is not None and report.wsr.rate > limit for _, report in innocent)
    text = f"By the paper's rule alone (WSR above {percent(limit, 0)}): {above} of {len(ends)} stolen "
    text += (
        f"{'model is' if len(ends) == 1 else 'models are'} above the paper's threshold, and it accuses {accused} of "
    )
    text += f"{len(innocent)} innocent {'model' if len(innocent) == 1 else 'models'}. The rule does not decide."
    return [Finding(text, "bad" if accused else "mixed")]


def _magnitude(results: Sequence[TrialResult]) -> list[Finding]:
    """Say how rare the WSR of the stolen models would be among innocent ones, by the extrapolating fit."""
    if is_many(results):  # two fits per trial; of thousands of trials, some are always unremarkable
        return []
    findings = [
        (probability, result)
        for result in results
        if (rung := last_rung(result)) is not None
        and (probability := evidence.magnitude(result, rung.report, rung.budget)) is not None
    ]
    if not findings:
        return []
    probability, result = max(findings, key=lambda each: each[0])
    fitted = len(result.null_reports) + sum(1 for each in result.stolen_nulls if each.budget == result.rungs[-1].budget)
    which = (
        "the stolen model's WSR" if len(findings) == 1 else f"the least remarkable WSR of {len(findings)} stolen models"
    )
    return [
        Finding(
            f"By a beta-binomial fitted to {fitted} innocent models, {which} has a probability of "
            f"{probability:.2g} among innocent models. The fit extrapolates; the ranks decide.",
            "good" if probability <= significance(results) else "mixed",
        )
    ]


def _theft(name: str, trials: Sequence[TrialResult], judged: Judgements) -> Finding | None:
    """Describe a group's substitutes at the largest budget, and the verdict at each budget."""
    ends = [rung for rung in map(last_rung, trials) if rung is not None]
    wsr = mean([rung.report.wsr.rate if rung.report.wsr else None for rung in ends])
    if not ends or wsr is None:
        return None
    by_budget: dict[int, list[Judgement]] = {}
    for trial in trials:
        for rung in sorted(trial.rungs, key=lambda each: each.budget):
            if (trial.trial, rung.budget) in judged:
                by_budget.setdefault(rung.budget, []).append(judged[trial.trial, rung.budget])
    verdicts = {budget: _worst(findings) for budget, findings in sorted(by_budget.items())}
    listed = "; ".join(f"{budget:,} queries: {judgement.verdict}" for budget, judgement in verdicts.items())
    text = (
        f"{name + ': a' if name else 'A'} substitute bought with {max(verdicts, default=ends[-1].budget):,} queries "
        f"reaches {percent(mean([rung.report.accuracy for rung in ends]))} accuracy and a WSR of "
        f"{percent(wsr)}. Verdicts: {listed or 'none, for want of null models'}."
    )
    return Finding(text, tone_of(list(verdicts.values())[-1].verdict) if verdicts else "mixed")
