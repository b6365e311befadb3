"""From the records of trials to the numbers that the verdicts rest on, and to the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mea_ray.results.records import ModelReport, TrialResult
from mea_ray.verification.pairs import OTHER_CLASSES
from mea_ray.verification.ranks import Rank, rank_among
from mea_ray.verification.verdict import Comparison, Evidence, Judgement, judge, least_accuracy

THRESHOLD = 0.3
SIGNIFICANCE = 0.01


def threshold(result: TrialResult) -> float:
    """Return the watermark success rate above which the trial's config calls a model stolen (the paper: 0.3)."""
    return float(_verification(result).get("threshold", THRESHOLD))


def significance(results: Sequence[TrialResult]) -> float:
    """Return the significance at which trials that are judged together are judged: the smallest of their configs."""
    return min((float(_verification(each).get("significance", SIGNIFICANCE)) for each in results), default=SIGNIFICANCE)


def judge_rungs(results: Sequence[TrialResult]) -> dict[tuple[str, int], Judgement]:
    """Judge every substitute of every trial, all at once.

    Returns:
        A judgement for each (name of the trial, budget); none for victims without a watermark.
    """
    found = {
        (result.trial, rung.budget): evidence(result, rung.report, rung.budget)
        for result in results
        for rung in result.rungs
    }
    return _judged(found, significance(results))


def judge_removals(results: Sequence[TrialResult]) -> dict[tuple[str, int], Judgement]:
    """Judge what removals left of stolen models and of victims, all at once.

    Returns:
        A judgement for each (name of the trial, position in ``removals``); none for those tried on null models.
    """
    found = {
        (result.trial, position): evidence(result, removal.after, max(rung.budget for rung in result.rungs))
        for result in results
        for position, removal in enumerate(result.removals)
        if removal.tried_on != "null_model" and result.rungs
    }
    return _judged(found, significance(results))


def _judged(found: Mapping[tuple[str, int], Evidence | None], at: float) -> dict[tuple[str, int], Judgement]:
    known = {place: each for place, each in found.items() if each is not None}
    return dict(zip(known, judge(list(known.values()), at), strict=True))


def accused(result: TrialResult, report: ModelReport) -> bool:
    """Return whether an innocent model of a trial would be accused: above the threshold, and not too poor to judge."""
    least = least_accuracy(chance(result), result.victim_report.accuracy)
    return report.wsr is not None and report.wsr.rate > threshold(result) and report.accuracy >= least


def evidence(result: TrialResult, report: ModelReport, budget: int) -> Evidence | None:
    """Return the evidence against one suspect of a trial.

    Args:
        result: The trial.
        report: Verification of the suspect: a substitute, or what a removal left of it.
        budget: Query budget of the suspect. Innocent models that were stolen with it are its controls.

    Returns:
        The evidence; None if the victim carries no watermark or there is no null model.
    """
    nulls = [null for null in result.null_reports if null.wsr is not None]
    stolen = [rung.report for rung in result.stolen_nulls if rung.budget == budget and rung.report.wsr is not None]
    victim = result.victim_report
    if report.wsr is None or victim.wsr is None or not nulls:
        return None
    name = statistic(result, [report, *nulls, *stolen])
    key = report.key_ranks.get(name)
    return Evidence(
        accuracy=report.accuracy,
        chance=chance(result),
        victim_accuracy=victim.accuracy,
        wsr=report.wsr.rate,
        victim_wsr=victim.wsr.rate,
        null_models=_rank(report, nulls, name),
        stolen_null_models=_among(report, stolen, name) if stolen else None,
        victim_rank=_rank(victim, nulls, name),
        key=Rank(key.at_least, key.references, "keys") if key is not None else None,
        key_drawn=result.key_drawn,
        comparisons=_comparisons(report),
        controls=len(nulls) + len(stolen),
        accused_controls=sum(accused(result, each) for each in [*nulls, *stolen]),
        threshold=threshold(result),
        statistic=name,
    )


def statistic(result: TrialResult, reports: Sequence[ModelReport]) -> str:
    """Return the statistic that models are ranked by: the config's where all reports have it, else ``wsr``."""
    name = str(_verification(result).get("statistic", "wsr"))
    return name if all(name in report.statistics for report in reports) else "wsr"


def _value(report: ModelReport, name: str) -> float:
    if name in report.statistics:
        return report.statistics[name]
    assert report.wsr is not None  # results of older versions have no other statistic
    return report.wsr.rate


def _among(report: ModelReport, references: Sequence[ModelReport], name: str) -> Rank:
    return rank_among(_value(report, name), [_value(each, name) for each in references])


def _rank(report: ModelReport, nulls: Sequence[ModelReport], name: str) -> Rank:
    """Return the rank among the null models as it was recorded, or from the recorded statistics.

    A watermark of answers has another key for every budget, and null models were measured with each of them.
    """
    recorded = report.null_ranks.get(name)
    return Rank(recorded.at_least, recorded.references) if recorded is not None else _among(report, nulls, name)


def chance(result: TrialResult) -> float:
    """Return the accuracy of guessing: as recorded, else one over the number of classes, 0 where that is not known."""
    if result.chance is not None:
        return result.chance
    classes = max((len(log.classes) for log in result.query_log.values()), default=0)
    return 1 / classes if classes > 1 else 0.0


def _verification(result: TrialResult) -> Mapping[str, Any]:
    section: Mapping[str, Any] = result.config.get("verification", {})
    return section


def _comparisons(report: ModelReport) -> tuple[Comparison, ...]:
    assert report.wsr is not None
    own, p_values = report.wsr.rate, report.specificity
    found = [Comparison(f"samples of {name}", own, rate.rate, p_values.get(name)) for name, rate in report.wfpr.items()]
    if report.wfpr_classes is not None:
        other = report.wfpr_classes.rate
        found.append(Comparison("mixes of other classes", own, other, p_values.get(OTHER_CLASSES)))
    return tuple(found)
