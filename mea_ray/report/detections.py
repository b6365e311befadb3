"""Detections as a table, and the triggers that they reverse-engineered as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mea_ray.report import tables
from mea_ray.report.removals import ON
from mea_ray.results.points import label, setting
from mea_ray.results.records import DetectionResult, TrialResult

STRIPS = 6
"""Maximum number of detections whose triggers are shown."""
RATES = ("false_positive", "detected")
HEADINGS = {
    "point": "Setting",
    "detection": "Detection",
    "on": "Tried on",
    "flagged": "Flagged classes",
    "measured": "Measured",
    "triggers": "Triggers on the stolen model",
}
"""Heading of each column of ``DetectionRow``, in display order."""


@dataclass(frozen=True)
class DetectionRow:
    """One row of the detections' table, as display texts."""

    point: str
    detection: str
    on: str
    flagged: str
    measured: str
    triggers: str


def lines(results: Sequence[TrialResult]) -> list[DetectionRow]:
    """Return the table of all detections; empty if none was tried."""
    return [
        DetectionRow(
            point=label(result.point, seeds=True),
            detection=setting({"name": detection.detection.get("name", "")}),
            on=ON[detection.tried_on],
            flagged=_flagged(detection),
            measured=_measured(detection),
            triggers=_triggers(detection),
        )
        for result in results
        for detection in result.detections
    ]


def pictures(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Return the triggers of the first detections that have any: ``title``, and ``pictures`` of caption and uri."""
    pictured: list[dict[str, Any]] = []
    for result in results:
        for detection in result.detections:
            drawn = [trigger for trigger in detection.triggers if trigger.picture]  # records contain no pictures
            if drawn and len(pictured) < STRIPS:
                title = (
                    f"{label(result.point, seeds=True)}: {detection.detection.get('name')}, {ON[detection.tried_on]}"
                )
                strip = [
                    {
                        "caption": f"{trigger.label}, {trigger.norm:.1f} pixels",
                        "uri": f"data:image/png;base64,{trigger.picture}",
                    }
                    for trigger in drawn
                ]
                pictured.append({"title": title, "pictures": strip})
    return pictured


def _flagged(detection: DetectionResult) -> str:
    if not detection.triggers and not {"candidates", "score"} & detection.numbers.keys():
        return tables.DASH
    named = ", ".join(detection.flagged) or "none"
    if detection.target is None or detection.tried_on == "null_model":
        return named
    return f"{named} (the target is {detection.target})"


def _measured(detection: DetectionResult) -> str:
    """Return the most informative numbers."""
    numbers = detection.numbers
    rates = [f"{name.replace('_', ' ')} {tables.percent(numbers[name])}" for name in RATES if name in numbers]
    if "auc" in numbers:
        rates.append(f"AUC {numbers['auc']:.2f}")
    highest = max((value for name, value in numbers.items() if name.startswith("anomaly/")), default=None)
    if highest is not None:
        rates.append(f"largest anomaly index {highest:.1f}")
    if "score" in numbers:
        rates.append(f"best key {numbers['score']:.2f}, next {numbers.get('next', 0):.2f}")
    if "candidates" in numbers:
        rates.append(f"{numbers['candidates']:.0f} candidate units")
    reasr = max((value for name, value in numbers.items() if name.startswith("reasr/")), default=None)
    if reasr is not None:
        rates.append(f"largest REASR {tables.percent(reasr)}")
    return ", ".join(rates) or tables.DASH


def _triggers(detection: DetectionResult) -> str:
    """Return on how many held-out images the best triggers work in the stolen model."""
    best = sorted(detection.triggers, key=lambda trigger: trigger.on_substitute.rate, reverse=True)[:3]
    return ", ".join(f"{t.label} {tables.percent(t.on_substitute.rate)}" for t in best) or tables.DASH
