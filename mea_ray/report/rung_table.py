"""Every substitute of a sweep as numbers: for the table of a large report, and for CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mea_ray.report.points import is_number
from mea_ray.report.tables import Judgements
from mea_ray.results.numbers import rung_metrics
from mea_ray.results.points import setting, short_paths
from mea_ray.results.records import RungResult, TrialResult

MEASURED: Mapping[str, str] = {
    "budget": "Budget",
    "wsr": "WSR",
    "after_removal": "After removal",
    "accuracy": "Accuracy",
    "fidelity": "Fidelity",
    "wfpr": "WFPR",
    "victim_gap": "Customers lose",
    "p": "p-value",
    "verdict": "Verdict",
    "trial": "Trial",
}
"""Columns on each substitute, with their headings. Rates and accuracies are fractions."""
RATES = frozenset({"wsr", "after_removal", "accuracy", "fidelity", "wfpr", "victim_gap"})
"""Columns shown in percent on a page."""


def lines(results: Sequence[TrialResult], judged: Judgements) -> list[dict[str, Any]]:
    """Return one row for each substitute: its settings by config path, then ``MEASURED``; None if unknown.

    Args:
        results: The trials.
        judged: Judgements on their substitutes.
    """
    paths = dict.fromkeys(path for result in results for path in result.point)
    table = []
    for result in results:
        point = {path: result.point.get(path) for path in paths}
        for rung in sorted(result.rungs, key=lambda each: each.budget):
            table.append({**{path: _plain(value) for path, value in point.items()}, **_measured(result, rung, judged)})
    return table


def _measured(result: TrialResult, rung: RungResult, judged: Judgements) -> dict[str, Any]:
    numbers = rung_metrics(result, rung)
    judgement = judged.get((result.trial, rung.budget))
    last = rung is max(result.rungs, key=lambda each: each.budget)
    left = [
        removal.after.wsr.rate
        for removal in result.removals
        if last and removal.tried_on == "substitute" and removal.after.wsr is not None
    ]
    known: dict[str, Any] = {
        **numbers,
        "after_removal": min(left, default=None),
        "p": None if judgement is None else judgement.p_value,
        "verdict": None if judgement is None else judgement.verdict,
        "trial": result.trial,
    }
    return {name: known.get(name) for name in MEASURED}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else setting(value)


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as CSV."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(table[0]) if table else list(MEASURED), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return buffer.getvalue()


def as_json(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a JSON object for the page's script, safe inside ``<script>``.

    Its ``columns`` have ``name``, ``label``, ``kind`` (``text``, ``number`` or ``percent``) and ``values``, one per
    row. Texts are indices into the column's ``texts``; numbers are rounded for display.
    """
    names = list(table[0]) if table else list(MEASURED)
    short = short_paths([name for name in names if name not in MEASURED])
    columns = []
    for name in names:
        values = [line[name] for line in table]
        numeric = all(value is None or is_number(value) for value in values)
        column: dict[str, Any] = {"name": short.get(name, name), "label": MEASURED.get(name, short.get(name, name))}
        if numeric and not all(value is None for value in values):
            digits = 4 if name in RATES else 6
            column["kind"] = "percent" if name in RATES else "number"
            column["values"] = [None if value is None else float(f"{value:.{digits}g}") for value in values]
        else:
            texts = {text: place for place, text in enumerate(dict.fromkeys(_text(value) for value in values))}
            column |= {"kind": "text", "texts": list(texts), "values": [texts[_text(value)] for value in values]}
        columns.append(column)
    # A setting can contain any text: "</script>" in it must not end the element.
    return json.dumps({"columns": columns}, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _text(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
