"""From trial results to the rows, groups and plain sentences that the terminal and the HTML report share.

Nothing here reads anything but ``TrialResult``; nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mea_ray.core.errors import ArtifactError
from mea_ray.results.records import ModelReport, Rate, RungResult, TrialResult

RESULTS = "results"
DASH = "–"
NOT_ACCUSED = "not accused"


def load_results(folder: Path) -> list[TrialResult]:
    """Read every trial result below a sweep's folder, in the order of their points.

    Args:
        folder: The sweep's folder (with ``results/*.json`` in it) or the ``results`` folder itself.

    Raises:
        ArtifactError: There is no result, or one of them is damaged or of another schema.
    """
    inside = folder / RESULTS
    paths = sorted((inside if inside.is_dir() else folder).glob("*.json"))
    if not paths:
        raise ArtifactError(
            f"no trial results (results/*.json) in {folder}; give the folder that `mea-ray sweep` printed"
        )
    return ordered([TrialResult.load(path) for path in paths])


def ordered(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials by what the sweep set: numbers by size, everything else by its text."""

    def key(result: TrialResult) -> tuple[list[tuple[str, bool, float, str]], str]:
        parts = []
        for path, value in result.point.items():
            is_number = isinstance(value, (int, float))
            parts.append((path, not is_number, float(value) if is_number else 0.0, setting(value)))
        return parts, result.trial

    return sorted(results, key=key)


def setting(value: Any) -> str:
    """Return the short form of a config value: a component by its name and what was set beside it."""
    if isinstance(value, Mapping):
        rest = ", ".join(f"{key}={setting(item)}" for key, item in value.items() if key != "name")
        name = str(value.get("name", ""))
        return f"{name}({rest})" if name and rest else name or rest
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "[]"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def is_seed(path: str) -> bool:
    """Whether a config path is a seed: trials that differ only in seeds are repetitions of one point."""
    return path.rpartition(".")[2] == "seed"


def label(point: Mapping[str, Any], *, seeds: bool = False) -> str:
    """Return the name of a point of the sweep, e.g. ``thief.model=resnet18``.

    Args:
        point: Config paths that the sweep set, and their values.
        seeds: Whether seeds are part of the name.
    """
    parts = [f"{p.removesuffix('.name')}={setting(v)}" for p, v in point.items() if seeds or not is_seed(p)]
    return ", ".join(parts) or "all trials"


def grouped(results: Sequence[TrialResult]) -> dict[str, list[TrialResult]]:
    """Group trials that differ only in their seeds, in the order of first appearance."""
    groups: dict[str, list[TrialResult]] = {}
    for result in results:
        groups.setdefault(label(result.point), []).append(result)
    return groups


def common_prefix(labels: Sequence[str]) -> str:
    """Return the config path that every label starts with (``thief.model=``), or an empty string.

    Legends of a sweep over one path need not repeat the path.
    """
    paths = {text.split("=")[0] for text in labels}
    alone = len(paths) == 1 and all("=" in text and ", " not in text for text in labels)
    return f"{paths.pop()}=" if alone else ""


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as text in percent, or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def interval(rate: Rate | None) -> str:
    """Return a rate with its 95 % Wilson interval as text, or a dash."""
    return DASH if rate is None else f"{percent(rate.rate)} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def p_text(p_value: float | None) -> str:
    """Return a p-value as people write it, or a dash."""
    if p_value is None:
        return DASH
    if p_value < 1e-16:
        return "< 1e-16"
    return f"{p_value:.1e}" if p_value < 1e-3 else f"{p_value:.3f}"


def verdict(report: ModelReport) -> str:
    """Return the judgement on one model in two or three words.

    Theft is *proved* only when WSR is above the paper's threshold and the p-value is at or below the significance.
    """
    if report.infringes_threshold is None and report.infringes_significance is None:
        return DASH
    if report.infringes_significance is None:
        return "above threshold" if report.infringes_threshold else "not proved"
    if report.infringes_threshold:
        return "theft proved" if report.infringes_significance else "not significant"
    return "below threshold" if report.infringes_significance else "not proved"


def control_verdict(report: ModelReport) -> str:
    """Return the judgement on a substitute of an innocent model."""
    if report.wsr is None:
        return DASH
    return "accused falsely" if proved(report) else NOT_ACCUSED


def proved(report: ModelReport) -> bool:
    """Whether both criteria call the model stolen (only the threshold where there is no p-value)."""
    return bool(report.infringes_threshold) and report.infringes_significance is not False


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values, or None when none is known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


@dataclass(frozen=True)
class Row:
    """One line of the results table: a rung of a trial. Texts are ready to be shown."""

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
    proved: bool

    @property
    def good(self) -> bool:
        """The verdict is what an owner hopes for: a thief is convicted, an innocent is not."""
        return self.proved or self.verdict == NOT_ACCUSED


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
"""Column of ``Row`` to its heading, in the order in which they are shown."""


def rows(results: Sequence[TrialResult]) -> list[Row]:
    """Return one row per rung, trials in their order, rungs by budget; below them the thefts of innocent models."""
    table = []
    for result in results:
        point = label(result.point, seeds=True) + (" (stopped)" if result.status == "stopped" else "")
        for rung in sorted(result.rungs, key=lambda r: r.budget):
            table.append(_row(result, rung, point, verdict(rung.report), proved(rung.report)))
        for rung in result.stolen_nulls:
            table.append(_row(result, rung, f"{point}: null model stolen", control_verdict(rung.report), False))
    return table


def _row(result: TrialResult, rung: RungResult, point: str, judgement: str, is_proved: bool) -> Row:
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
        p_value=p_text(report.p_value),
        verdict=judgement,
        proved=is_proved,
    )


@dataclass(frozen=True)
class Cost:
    """What a watermark costs an honest customer, against the innocent models. Fractions; None where unknown."""

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
    found: dict[str, Cost] = {}
    for result in results:
        if result.victim in found:
            continue
        victim, nulls = result.victim_report, result.null_reports
        sources = {
            name: (value, mean([null.source_accuracy.get(name) for null in nulls]))
            for name, value in victim.source_accuracy.items()
        }
        own = {p: v for p, v in result.point.items() if p.split(".")[0] in {"data", "splits", "victim"}}
        found[result.victim] = Cost(
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
    return list(found.values())
