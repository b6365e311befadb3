"""The numbers of a result, flattened: one dictionary per rung, the same for every tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mea_ray.results.numbers import rung_metrics
from mea_ray.results.points import short_name, short_paths
from mea_ray.results.records import TrialResult


class TrialSettings(Protocol):
    """The settings by which a run is named and grouped: of a trial's result, or of a started trial."""

    @property
    def trial(self) -> str:
        """Name of the trial."""
        ...

    @property
    def victim(self) -> str:
        """Name of its victim."""
        ...

    @property
    def point(self) -> Mapping[str, Any]:
        """What the sweep set."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Its experiment."""
        ...

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the packages and of the code."""
        ...


CURVE_POINTS = 500
"""Maximum number of points of an attack's own curve sent to a tracker."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a.b": value}`` of a nested mapping; lists become text, since W&B and CSV need single values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat


def groups_of(result: TrialSettings) -> dict[str, str]:
    """Return the groups of a trial: its ``victim``, its ``seed``, and its ``setting`` without the seed."""
    seeds = {path: value for path, value in result.point.items() if path.rpartition(".")[2] == "seed"}
    rest = flatten({path: value for path, value in result.point.items() if path not in seeds})
    setting = ", ".join(f"{path}={value}" for path, value in rest.items())
    return {
        "victim": f"victim-{result.victim}",
        "seed": f"seed-{result.config.get('seed', 0)}",
        "setting": setting[:120] or "all trials",
    }


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Return at most ``most`` (2 or more) of the points, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(place * step)] for place in range(most)]


def attack_curves(result: TrialResult) -> dict[str, list[tuple[int, float]]]:
    """Return the attack's own curves up to its largest budget: (queries so far, value) by ``attack/<name>``.

    A long line is thinned to ``CURVE_POINTS``.
    """
    logged = result.rungs[-1].curves if result.rungs else {}
    return {f"attack/{name}": thinned(points, CURVE_POINTS) for name, points in logged.items()}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` of ``{"a.b": value}``: W&B filters and groups by the parts of a nested key."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        inner = tree
        for name in parents:
            below = inner.get(name)
            if not isinstance(below, dict):  # a value above: both are kept, the value by an empty name
                below = inner[name] = {} if below is None else {"": below}
            inner = below
        if isinstance(inner.get(last), dict):
            inner[last][""] = value
        else:
            inner[last] = value
    return tree


def name_of(result: TrialSettings) -> str:
    """Return the name of a trial's run: a short form of its point, or the trial's name if the point is empty."""
    return short_name(result.point, short_paths(list(result.point)), seeds=True)[:120] if result.point else result.trial


def innocent_band(result: TrialResult, budget: int) -> dict[str, float]:
    """Return the lowest and highest WSR of innocent models, and of those stolen with a budget; empty without any."""
    reports = [*result.null_reports, *(rung.report for rung in result.stolen_nulls if rung.budget == budget)]
    rates = [report.wsr.rate for report in reports if report.wsr is not None]
    return {"null_low": min(rates), "null_high": max(rates)} if rates else {}


def owner_saw(result: TrialResult) -> dict[str, float | int | bool | str | None]:
    """Return the owner's view of the trial's accounts, numbered from 1: ``query_log.<number>.<what>``."""
    numbers: dict[str, float | int | bool | str | None] = {}
    for number, (client, log) in enumerate(result.query_log.items(), start=1):
        seen: dict[str, float | int | bool | str | None] = {
            "client": client,
            "requests": log.requests,
            "images": log.images,
            "marked": log.marked,
            "flagged": log.flagged,
            "classes": ",".join(map(str, log.classes)),
            "distances": log.distances,
            "shapiro_w": log.shapiro_w,
            "alarm": log.alarm,
        }
        numbers |= {f"query_log.{number}.{name}": value for name, value in seen.items()}
    return numbers


def follow_up(result: TrialResult) -> dict[str, float]:
    """Return the results of removals and detections, ``removal.<name>(<strength>).<model>.<what>`` and so on."""
    numbers: dict[str, float] = {}
    for removal in result.removals:
        name = f"removal.{removal.removal.get('name')}({removal.strength:g}).{removal.tried_on}"
        numbers[f"{name}.accuracy"] = removal.after.accuracy
        if removal.after.wsr is not None:
            numbers[f"{name}.wsr"] = removal.after.wsr.rate
    for detection in result.detections:
        name = f"detection.{detection.detection.get('name')}.{detection.tried_on}"
        numbers |= {f"{name}.{what}": value for what, value in detection.numbers.items()}
    return numbers


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
        fixed | rung_metrics(result, rung) | {"infringes": rung.report.infringes_threshold} for rung in result.rungs
    ]
