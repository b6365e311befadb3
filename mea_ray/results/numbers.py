"""The numbers of a result, each defined in one place, for schedulers, searchers, trackers, tables and frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from mea_ray.results.records import ModelReport, RungResult, TrialResult

METRICS = ("wsr", "wfpr", "accuracy", "fidelity", "p_value", "queries", "victim_gap")
"""Metrics for schedulers and searchers."""


THRESHOLD = 0.3
"""The paper's threshold: a model counts as stolen above it."""


def threshold(result: TrialResult) -> float:
    """Return the watermark success rate above which a model counts as stolen in the trial's config."""
    return float(result.config.get("verification", {}).get("threshold", THRESHOLD))


def mean_wsr(reports: Sequence[ModelReport]) -> float | None:
    """Return the mean watermark success rate, in [0, 1]; None if no report has one."""
    rates = [report.wsr.rate for report in reports if report.wsr is not None]
    return fmean(rates) if rates else None


def null_wsr(result: TrialResult) -> float | None:
    """Return the mean WSR of the null models, in [0, 1]; None without a key."""
    return mean_wsr(result.null_reports)


def stolen_null_wsr(result: TrialResult, budget: int) -> float | None:
    """Return the mean WSR of null models stolen with a budget, in [0, 1]; None without any."""
    return mean_wsr([rung.report for rung in result.stolen_nulls if rung.budget == budget])


def victim_gap(result: TrialResult) -> float | None:
    """Return the cost of the watermark for an honest customer: mean accuracy of the null models minus the victim's.

    A fraction, negative if the victim is more accurate; None without null models.
    """
    innocent = [null.accuracy for null in result.null_reports]
    return fmean(innocent) - result.victim_report.accuracy if innocent else None


def report_numbers(report: ModelReport) -> dict[str, float]:
    """Return the available numbers of one model's report."""
    numbers = {
        "wsr": report.wsr.rate if report.wsr else None,
        "wsr_low": report.wsr.low if report.wsr else None,
        "wsr_high": report.wsr.high if report.wsr else None,
        "wfpr": report.wfpr_mean,
        "wfpr_classes": report.wfpr_classes.rate if report.wfpr_classes else None,
        "accuracy": report.accuracy,
        "knn_accuracy": report.knn_accuracy,
        "fidelity": report.fidelity,
        "p_value": report.p_value,
        **report.statistics,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def rung_metrics(result: TrialResult, rung: RungResult) -> dict[str, float | int]:
    """Return one point of the robustness curve: ``queries`` (the x axis) and every available number."""
    numbers = {
        "queries": rung.queries,
        "budget": rung.budget,
        **report_numbers(rung.report),
        "null_wsr": null_wsr(result),
        "stolen_null_wsr": stolen_null_wsr(result, rung.budget),
        "victim_gap": victim_gap(result),
        "train_seconds": rung.seconds,
        "train_epochs": rung.epochs,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def trial_metrics(result: TrialResult, rung: RungResult) -> dict[str, float]:
    """Return ``METRICS`` of a rung for schedulers and searchers; NaN for missing numbers (no key)."""
    numbers = rung_metrics(result, rung)
    return {name: float(numbers.get(name, math.nan)) for name in METRICS}
