"""The numbers of a result, flattened: one dictionary per rung, the same for every tracker."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from mea_ray.results import RungResult, TrialResult


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a.b": value}`` of a nested mapping; lists become text, as W&B and CSV want single values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat


def null_wsr(result: TrialResult) -> float | None:
    """Return the mean WSR of the null models, in [0, 1]; None without a key."""
    rates = [report.wsr.rate for report in result.null_reports if report.wsr is not None]
    return fmean(rates) if rates else None


def rung_metrics(result: TrialResult, rung: RungResult) -> dict[str, float | int]:
    """Return one point of the robustness curve: ``queries`` (the x axis) and every number that exists there."""
    report = rung.report
    numbers = {
        "queries": rung.queries,
        "budget": rung.budget,
        "wsr": report.wsr.rate if report.wsr else None,
        "wsr_low": report.wsr.low if report.wsr else None,
        "wsr_high": report.wsr.high if report.wsr else None,
        "wfpr": report.wfpr_mean,
        "accuracy": report.accuracy,
        "fidelity": report.fidelity,
        "p_value": report.p_value,
        "null_wsr": null_wsr(result),
        "train_seconds": rung.seconds,
        "train_epochs": rung.epochs,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def rows(result: TrialResult) -> list[dict[str, Any]]:
    """Return one row per rung, for tables."""
    victim = result.victim_report
    fixed: dict[str, Any] = {
        "trial": result.trial,
        "status": result.status,
        "victim": result.victim,
        **{f"set.{path}": value for path, value in flatten(result.point).items()},
        "victim_accuracy": victim.accuracy,
        "victim_wsr": victim.wsr.rate if victim.wsr else None,
        "queries_charged": result.queries_charged,
        "seconds": result.seconds,
    }
    return [
        fixed | rung_metrics(result, rung) | {"infringes": rung.report.infringes_significance} for rung in result.rungs
    ]
