"""From the record of a trial to the numbers that the verdict rests on."""

from __future__ import annotations

from mea_ray.results.records import ModelReport, TrialResult
from mea_ray.verification.ranks import rank_among
from mea_ray.verification.verdict import Comparison, Evidence


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
    threshold = float(result.config.get("verification", {}).get("threshold", 0.3))
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
        accused_controls=sum(rate > threshold for rate in [*null_rates, *stolen_rates]),
        threshold=threshold,
    )


def chance(result: TrialResult) -> float:
    """Return the accuracy of guessing, one over the number of classes; 0 where the record does not say it."""
    classes = max((len(log.classes) for log in result.query_log.values()), default=0)
    return 1 / classes if classes > 1 else 0.0


def _comparisons(report: ModelReport) -> tuple[Comparison, ...]:
    assert report.wsr is not None
    own = report.wsr.rate
    found = [Comparison(f"samples of {name}", own, rate.rate) for name, rate in report.wfpr.items()]
    if report.wfpr_classes is not None:
        found.append(Comparison("mixes of other classes", own, report.wfpr_classes.rate))
    return tuple(found)
