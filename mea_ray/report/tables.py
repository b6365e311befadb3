"""Rows, groups and sentences from trial results, shared by the terminal and the HTML report.

Only ``TrialResult`` is read; nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from mea_ray.results.points import label, shortened
from mea_ray.results.records import ModelReport, RungResult, SuccessRate, TrialResult
from mea_ray.verification.evidence import accused, judge_rungs
from mea_ray.verification.verdict import Judgement, Verdict

DASH = "–"
MANY = 24
"""Number of points above which a sweep is summarised instead of being shown point by point."""
NOT_ACCUSED = "not accused"
Judgements = Mapping[tuple[str, int], Judgement]
"""Judgements on substitutes by (trial name, budget)."""
Tone = Literal["good", "mixed", "bad"]
"""Whether a finding supports the owner's proof (good), weakens it (bad), or neither (mixed)."""
MARKS: Mapping[Tone, str] = {"good": "✓", "mixed": "•", "bad": "✗"}
"""Marker before a sentence of each tone."""


def grouped(results: Sequence[TrialResult]) -> dict[str, list[TrialResult]]:
    """Group trials that differ only in their seeds, in the order of first appearance."""
    groups: dict[str, list[TrialResult]] = {}
    for result in results:
        groups.setdefault(label(result.point), []).append(result)
    return groups


def with_short_points(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials with points that show only what distinguishes each component from the others."""
    points = shortened([result.point for result in results])
    return [result.model_copy(update={"point": point}) for result, point in zip(results, points, strict=True)]


def common_prefix(labels: Sequence[str]) -> str:
    """Return the config path that every label starts with (``thief.model=``), or an empty string.

    Legends of a sweep over one path do not repeat the path.
    """
    paths = {text.split("=")[0] for text in labels}
    alone = len(paths) == 1 and all("=" in text and ", " not in text for text in labels)
    return f"{paths.pop()}=" if alone else ""


def listed(values: Iterable[str]) -> str:
    """Return the distinct values, in the order of first appearance, as one text."""
    return ", ".join(dict.fromkeys(values))


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as text in percent, or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def interval(rate: SuccessRate | None) -> str:
    """Return a rate with its 95 % Wilson interval as text, or a dash."""
    return DASH if rate is None else f"{percent(rate.rate)} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def p_text(p_value: float | None) -> str:
    """Return a p-value as text, or a dash."""
    if p_value is None:
        return DASH
    if p_value < 1e-16:
        return "< 1e-16"
    return f"{p_value:.1e}" if p_value < 1e-3 else f"{p_value:.3f}"


def tone_of(verdict: Verdict) -> Tone:
    """Return the colour of a verdict on a stolen model."""
    if verdict == "proved":
        return "good"
    return "mixed" if verdict in {"suggestive", "not committed"} else "bad"


def control_verdict(result: TrialResult, report: ModelReport) -> tuple[str, Tone]:
    """Return the judgement on an innocent model, and its colour."""
    if report.wsr is None:
        return DASH, "mixed"
    return ("accused falsely", "bad") if accused(result, report) else (NOT_ACCUSED, "good")


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None without any."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


@dataclass(frozen=True)
class Row:
    """One row of the results table: a rung of a trial, or a ``control``, as display texts."""

    trial: str
    point: str
    queries: str
    victim: str
    null: str
    accuracy: str
    fidelity: str
    wsr: str
    wfpr: str
    p_value: str
    verdict: str
    tone: Tone
    control: bool = False


HEADINGS = {
    "point": "Setting",
    "queries": "Queries",
    "victim": "Victim accuracy",
    "null": "Null accuracy",
    "accuracy": "Substitute accuracy",
    "fidelity": "Fidelity",
    "wsr": "WSR [95% interval]",
    "wfpr": "WFPR (other classes)",
    "p_value": "p-value",
    "verdict": "Verdict",
}
"""Heading of each column of ``Row``, in display order."""


def is_many(results: Sequence[TrialResult]) -> bool:
    """Return whether a sweep has more points than can be shown one by one."""
    return len(grouped(results)) > MANY


def rows(results: Sequence[TrialResult], judged: Judgements | None = None) -> list[Row]:
    """Return one row per rung, trials in their order, rungs by budget; below them the thefts of innocent models.

    Args:
        results: The trials.
        judged: Judgements on their substitutes, of the whole sweep; None judges only these trials.
    """
    judged = judge_rungs(results) if judged is None else judged
    table = []
    for result in results:
        point = label(result.point, seeds=True) + (" (stopped)" if result.status == "stopped" else "")
        for rung in sorted(result.rungs, key=lambda r: r.budget):
            judgement = judged.get((result.trial, rung.budget))
            if judgement is None:
                table.append(_row(result, rung, point, None, DASH, "mixed"))
            else:
                judged_as = judgement.p_value, judgement.text, tone_of(judgement.verdict)
                table.append(_row(result, rung, point, *judged_as))
        stolen: dict[int, list[RungResult]] = {}
        for rung in result.stolen_nulls:
            stolen.setdefault(rung.budget, []).append(rung)
        table += [_control_row(result, rungs, point) for rungs in stolen.values()]
    return table


def _row(result: TrialResult, rung: RungResult, point: str, p_value: float | None, verdict: str, tone: Tone) -> Row:
    report, other = rung.report, rung.report.wfpr_classes
    return Row(
        trial=result.trial,
        point=point,
        queries=f"{rung.queries:,}",
        victim=percent(result.victim_report.accuracy),
        null=percent(mean([null.accuracy for null in result.null_reports])),
        accuracy=percent(report.accuracy),
        fidelity=percent(report.fidelity),
        wsr=interval(report.wsr),
        wfpr=percent(report.wfpr_mean) + (f" ({percent(other.rate)})" if other is not None else ""),
        p_value=p_text(p_value),
        verdict=verdict,
        tone=tone,
    )


def _control_row(result: TrialResult, rungs: Sequence[RungResult], point: str) -> Row:
    """Return the row of the null models that were stolen with one budget: means, and how many would be accused."""
    if len(rungs) == 1:
        point, judged_as = f"{point}: null model stolen", control_verdict(result, rungs[0].report)
        return replace(_row(result, rungs[0], point, None, *judged_as), control=True)
    reports = [rung.report for rung in rungs]
    falsely = sum(accused(result, report) for report in reports)
    rates = [report.wsr.rate for report in reports if report.wsr is not None]
    wsr = f"{percent(mean(rates))}, at most {percent(max(rates))}" if rates else DASH
    others = [report.wfpr_classes.rate for report in reports if report.wfpr_classes is not None]
    wfpr = percent(mean([report.wfpr_mean for report in reports])) + (f" ({percent(mean(others))})" if others else "")
    return replace(
        _row(result, rungs[0], f"{point}: {len(rungs)} null models stolen", None, DASH, "mixed"),
        accuracy=percent(mean([report.accuracy for report in reports])),
        fidelity=percent(mean([report.fidelity for report in reports])),
        control=True,
        wsr=wsr,
        wfpr=wfpr,
        verdict=f"{falsely or 'none'} of {len(rungs)} accused falsely" if rates else DASH,
        tone=("bad" if falsely else "good") if rates else "mixed",
    )


@dataclass(frozen=True)
class Cost:
    """The cost of a watermark for an honest customer, compared with innocent models. Fractions; None if unknown."""

    victim: str
    point: str
    accuracy: float
    null_accuracy: float | None
    calibration: float | None
    null_calibration: float | None
    target_probability: float | None
    null_target_probability: float | None
    source_accuracy: Mapping[str, tuple[float, float | None]]

    @property
    def points(self) -> float | None:
        """Victim minus null accuracy, in percentage points."""
        return None if self.null_accuracy is None else 100 * (self.accuracy - self.null_accuracy)


def costs(results: Sequence[TrialResult]) -> list[Cost]:
    """Return one entry per distinct victim, in the order of first appearance."""
    by_victim: dict[str, Cost] = {}
    for result in results:
        if result.victim in by_victim:
            continue
        victim, nulls = result.victim_report, result.null_reports
        sources = {
            name: (value, mean([null.source_accuracy.get(name) for null in nulls]))
            for name, value in victim.source_accuracy.items()
        }
        own = {p: v for p, v in result.point.items() if p.split(".")[0] in {"data", "splits", "victim"}}
        by_victim[result.victim] = Cost(
            victim=result.victim,
            point=label(own, seeds=True) if own else "",
            accuracy=victim.accuracy,
            null_accuracy=mean([null.accuracy for null in nulls]),
            calibration=victim.calibration_error,
            null_calibration=mean([null.calibration_error for null in nulls]),
            target_probability=victim.source_target_probability,
            null_target_probability=mean([null.source_target_probability for null in nulls]),
            source_accuracy=sources,
        )
    return list(by_victim.values())
