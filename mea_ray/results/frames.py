"""Trial results as a pandas frame, for your own tables, plots and analyses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mea_ray.results.points import setting
from mea_ray.results.records import ModelReport, RungResult, TrialResult, read_results

COLUMNS = (
    "trial",
    "status",
    "victim",
    "model",
    "removal",
    "tried_on",
    "budget",
    "queries",
    "accuracy",
    "knn_accuracy",
    "fidelity",
    "wsr",
    "wsr_low",
    "wsr_high",
    "wfpr",
    "wfpr_classes",
    "p_value",
    "above_threshold",
)
"""Columns of every frame; one column for each config path that the sweep set follows them."""


def load_results(folder: str | Path) -> pd.DataFrame:
    """Read the results of a sweep into a frame with one row for each model that was measured.

    Args:
        folder: The sweep's folder, which contains ``results/*.json``.

    Returns:
        A frame with these columns, and one more for each config path that the sweep set. Missing values are NaN (None
        in text columns).

        - ``trial``, ``status``: name of the trial; ``finished``, or ``stopped`` by the sweep's scheduler.
        - ``victim``: name of the victim's artifact. The row of a shared victim is repeated for each trial.
        - ``model``: ``victim``, ``null model``, ``substitute``, ``stolen null model`` or ``after removal``.
        - ``removal``, ``tried_on``: for ``after removal`` rows: settings of the removal, and the model that it was
        applied to. - ``budget``, ``queries``: for substitutes: query budget, and number of charged images. -
        ``accuracy``, ``knn_accuracy``, ``fidelity``, ``wsr``, ``wsr_low``, ``wsr_high``, ``wfpr``, ``wfpr_classes``,
          ``p_value``: as in ``ModelReport``, all in [0, 1]. ``wsr_low`` and ``wsr_high`` are its 95% Wilson interval.
        - ``above_threshold``: whether WSR is above the paper's threshold. The verdict on a substitute requires more,
        see
          ``mea_ray.verification.evidence.judge_rungs``.

    Raises:
        ArtifactError: The folder cannot be read or holds no result, or a result is not usable.
    """
    return frame(read_results(Path(folder)))


def frame(results: Iterable[TrialResult]) -> pd.DataFrame:
    """Return the frame of some results; see ``load_results``."""
    rows = [row for result in results for row in _rows(result)]
    paths = dict.fromkeys(column for row in rows for column in row if column not in COLUMNS)
    return pd.DataFrame(rows, columns=[*COLUMNS, *paths])


def _rows(result: TrialResult) -> Iterator[dict[str, Any]]:
    point = {path: value if _is_plain(value) else setting(value) for path, value in result.point.items()}
    common = {"trial": result.trial, "status": result.status, "victim": result.victim, **point}
    yield common | {"model": "victim"} | _numbers(result.victim_report)
    for report in result.null_reports:
        yield common | {"model": "null model"} | _numbers(report)
    for rung in sorted(result.rungs, key=lambda each: each.budget):
        yield common | {"model": "substitute"} | _rung(rung)
    for rung in result.stolen_nulls:
        yield common | {"model": "stolen null model"} | _rung(rung)
    for removal in result.removals:
        what = {"model": "after removal", "removal": setting(removal.removal), "tried_on": removal.tried_on}
        yield common | what | _numbers(removal.after)


def _rung(rung: RungResult) -> dict[str, Any]:
    return {"budget": rung.budget, "queries": rung.queries, **_numbers(rung.report)}


def _numbers(report: ModelReport) -> dict[str, Any]:
    return {
        "accuracy": report.accuracy,
        "knn_accuracy": report.knn_accuracy,
        "fidelity": report.fidelity,
        "wsr": report.wsr.rate if report.wsr else None,
        "wsr_low": report.wsr.low if report.wsr else None,
        "wsr_high": report.wsr.high if report.wsr else None,
        "wfpr": report.wfpr_mean,
        "wfpr_classes": report.wfpr_classes.rate if report.wfpr_classes else None,
        "p_value": report.p_value,
        "above_threshold": report.infringes_threshold,
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
