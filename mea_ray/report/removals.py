"""Removals by their losses: WSR lost against accuracy lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from mea_ray.report import curves, tables
from mea_ray.results.points import setting
from mea_ray.results.records import RemovalResult, TrialResult
from mea_ray.verification.evidence import judge_removals
from mea_ray.verification.verdict import SEVERITY, Judgement

ON = {"substitute": "stolen model", "victim": "victim", "null_model": "null model"}
"""Display text of the model to which a removal was applied, by its name in the config."""


@dataclass(frozen=True)
class RemovalRow:
    """One row of the removals' table: a removal on one kind of model, over trials that differ only in seeds."""

    point: str
    removal: str
    on: str
    accuracy: str
    accuracy_lost: str
    wsr: str
    wsr_lost: str
    p_value: str
    verdict: str
    tone: tables.Tone


HEADINGS = {
    "point": "Setting",
    "removal": "Removal",
    "on": "Tried on",
    "accuracy": "Accuracy",
    "accuracy_lost": "Lost",
    "wsr": "WSR",
    "wsr_lost": "Lost",
    "p_value": "Largest p-value",
    "verdict": "Verdict",
}
"""Heading of each column of ``RemovalRow``, in display order."""


@dataclass(frozen=True)
class Loss:
    """Losses caused by a removal, in percentage points, means over seeds; ``wsr`` is None without a key.

    ``places`` are trial and index of each result, as in ``judge_removals``.
    """

    removal: str
    name: str
    on: str
    strength: float
    accuracy: float
    wsr: float | None
    results: tuple[RemovalResult, ...]
    places: tuple[tuple[str, int], ...]


def losses(trials: Sequence[TrialResult]) -> list[Loss]:
    """Return the losses of each removal on each kind of model, in the order of the config."""
    rows = [
        {
            "removal": setting(result.removal),
            "on": result.tried_on,
            "place": (trial.trial, position),
            "result": result,
            "accuracy": 100 * (result.before.accuracy - result.after.accuracy),
            "wsr": 100 * (before.rate - after.rate)
            if (before := result.before.wsr) and (after := result.after.wsr)
            else None,
        }
        for trial in trials
        for position, result in enumerate(trial.removals)
    ]
    if not rows:
        return []
    return [
        Loss(
            removal=str(removal),
            name=str(group["result"].iloc[0].removal["name"]),
            on=str(on),
            strength=group["result"].iloc[0].strength,
            accuracy=group["accuracy"].mean(),
            wsr=None if group["wsr"].isna().all() else group["wsr"].astype(float).mean(),
            results=tuple(group["result"]),
            places=tuple(group["place"]),
        )
        for (removal, on), group in pd.DataFrame(rows).groupby(["removal", "on"], sort=False)
    ]


def lines(results: Sequence[TrialResult], judged: tables.Judgements | None = None) -> list[RemovalRow]:
    """Return the table of all removals; empty if none was tried. For a sweep of many points, one row over them all.

    Args:
        results: The trials.
        judged: Judgements on the models after removals (``judge_removals``), of the whole sweep; None judges only these
            trials.
    """
    judged = judge_removals(results) if judged is None else judged
    by_name = {result.trial: result for result in results}
    groups = tables.grouped(results)
    if tables.is_many(results):
        groups = {f"{len(groups):,} points": list(results)}
    return [_row(point, loss, judged, by_name) for point, trials in groups.items() for loss in losses(trials)]


def _row(point: str, loss: Loss, judged: tables.Judgements, by_name: Mapping[str, TrialResult]) -> RemovalRow:
    after = [result.after for result in loss.results]
    known = [judged[place] for place in loss.places if place in judged]
    text, tone = _verdict(loss, known, by_name)
    return RemovalRow(
        point=point,
        removal=loss.removal,
        on=ON[loss.on],
        accuracy=tables.percent(fmean(report.accuracy for report in after)),
        accuracy_lost=f"{loss.accuracy:+.1f}",
        wsr=tables.percent(tables.mean([report.wsr.rate if report.wsr else None for report in after])),
        wsr_lost=tables.DASH if loss.wsr is None else f"{loss.wsr:+.1f}",
        p_value=tables.p_text(max((judgement.p_value for judgement in known), default=None)),
        verdict=text,
        tone=tone,
    )


def _verdict(loss: Loss, known: Sequence[Judgement], by_name: Mapping[str, TrialResult]) -> tuple[str, tables.Tone]:
    """Return the worst verdict of a removal's results; for many results, how many are proved."""
    if loss.on == "null_model":
        controls = [
            tables.control_verdict(by_name[trial], result.after)
            for (trial, _), result in zip(loss.places, loss.results, strict=True)
        ]
        return min(controls, key=lambda control: ("bad", "mixed", "good").index(control[1]))
    if not known:
        return tables.DASH, "mixed"
    worst = min(known, key=lambda judgement: SEVERITY.index(judgement.verdict))
    proved = sum(judgement.verdict == "proved" for judgement in known)
    if len(known) > tables.MANY and proved < len(known):
        return f"{proved:,} of {len(known):,} proved", "mixed" if proved else "bad"
    return worst.text, tables.tone_of(worst.verdict)


def figures(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Return one chart per point of the sweep: a line per removal, over its strength, on the stolen model.

    Returns:
        For each: ``title``, ``legend`` and ``svg``.
    """
    from markupsafe import Markup

    panels = []
    for position, (point, trials) in enumerate(tables.grouped(results).items()):
        known = [loss for loss in losses(trials) if loss.on == "substitute" and loss.wsr is not None]
        names = list(dict.fromkeys(loss.name for loss in known))[: curves.MAX_LINES]
        if not names:
            continue
        by_name = {
            name: sorted((loss for loss in known if loss.name == name), key=lambda loss: loss.strength)
            for name in names
        }
        legend = [{"name": n, "colour": f"c{i}", "marker": curves.GLYPHS[i]} for i, n in enumerate(names)]
        panels.append({"title": point, "legend": legend, "svg": Markup(svg(by_name, f"r{position}"))})
    return panels


def svg(by_name: dict[str, list[Loss]], identity: str) -> str:
    """Draw the chart of one point of the sweep; see ``curves.svg``."""
    with curves.style(identity):
        figure = curves.new_figure((5.6, 3.6))
        axes = figure.add_subplot()
        for position, points in enumerate(by_name.values()):
            axes.plot(
                [point.accuracy for point in points],
                [point.wsr or 0.0 for point in points],
                color=curves.COLOURS[position],
                marker=curves.MARKERS[position],
                markersize=5,
                linewidth=1.4,
            )
        for draw in (axes.axhline, axes.axvline):
            draw(0, color=curves.MUTED, linewidth=1, zorder=1)
        axes.set_xlabel("accuracy lost (points)", color=curves.MUTED, fontsize=9)
        axes.set_ylabel("WSR lost (points)", color=curves.MUTED, fontsize=9)
        curves.plain(axes)
        described = [
            f"{name}: " + ", ".join(f"{p.wsr:.0f} points of WSR for {p.accuracy:.1f} of accuracy" for p in points)
            for name, points in by_name.items()
        ]
        return curves.as_svg(figure, identity, "What removals took", "; ".join(described))
