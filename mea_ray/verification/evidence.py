"""From the records of trials to the numbers that the verdicts rest on, and to the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mea_ray.results.records import ModelReport, TrialResult
from mea_ray.verification.ranks import rank_among
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
    if report.wsr is None:
        return None
    nulls = [null for null in result.null_reports if null.wsr is not None]
    stolen = [rung.report for rung in result.stolen_nulls if rung.budget == budget and rung.report.wsr is not None]
    null_rates, stolen_rates = ([each.wsr.rate for each in group if each.wsr] for group in (nulls, stolen))
    if not nulls:
        return None
    victim = result.victim_report
    victim_wsr = victim.wsr.rate if victim.wsr else 0.0
    return Evidence(
        accuracy=report.accuracy,
        chance=chance(result),
        victim_accuracy=victim.accuracy,
        wsr=report.wsr.rate,
        victim_wsr=victim_wsr,
        null_models=rank_among(report.wsr.rate, null_rates),
        stolen_null_models=rank_among(report.wsr.rate, stolen_rates) if stolen else None,
        victim_rank=rank_among(victim_wsr, null_rates),
        comparisons=_comparisons(report),
        controls=len(nulls) + len(stolen),
        accused_controls=sum(accused(result, each) for each in [*nulls, *stolen]),
        threshold=threshold(result),
    )


def chance(result: TrialResult) -> float:
    """Return the accuracy of guessing, one over the number of classes; 0 where the record does not say it."""
    classes = max((len(log.classes) for log in result.query_log.values()), default=0)
    return 1 / classes if classes > 1 else 0.0


def _verification(result: TrialResult) -> Mapping[str, Any]:
    section: Mapping[str, Any] = result.config.get("verification", {})
    return section


def _comparisons(report: ModelReport) -> tuple[Comparison, ...]:
    assert report.wsr is not None
    own = report.wsr.rate
    found = [Comparison(f"samples of {name}", own, rate.rate) for name, rate in report.wfpr.items()]
    if report.wfpr_classes is not None:
        found.append(Comparison("mixes of other classes", own, report.wfpr_classes.rate))
    return tuple(found)
