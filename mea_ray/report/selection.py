"""How the settings of a sweep were chosen: a sentence, and for the sweep that chose, the chosen settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from mea_ray.report.tables import DASH, percent
from mea_ray.report.verdict import last_rung
from mea_ray.results.numbers import trial_metrics
from mea_ray.results.points import label
from mea_ray.results.records import SelectionRecord, TrialResult

HEADINGS = ("Chosen setting", "Tried", "Metric", "Seeds")


@dataclass(frozen=True)
class Chosen:
    """The best setting of a component, as display texts.

    Attributes:
        setting: The point of the sweep.
        tried: Numbers of tried settings of the component, and of those within the constraints.
        metric: Mean of the metric over the development seeds; a dash if no setting is within the constraints.
        seeds: Number of seeds.
    """

    setting: str
    tried: str
    metric: str
    seeds: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells in the order of ``HEADINGS``."""
        return self.setting, self.tried, self.metric, self.seeds


def sentence(results: Sequence[TrialResult]) -> str | None:
    """Say how the settings were chosen; None if the results do not record it."""
    selection = results[0].selection
    if selection is None:
        return None
    limits = "".join(f", {name} at most {limit:g}" for name, limit in selection.constraints.items())
    way = "largest" if selection.mode == "max" else "smallest"
    seeds = ranges(selection.seeds)
    how = f"by the {way} {selection.metric}{limits} on {selection.data} images, development seeds {seeds}"
    if not selection.sweep:
        return f"Settings are chosen here, {how}. These are no results to report."
    own = sorted({seed for result in results for seed in seeds_of(result)})
    return f"Settings were chosen in the sweep {selection.sweep}, {how}; reported on test images, seeds {ranges(own)}."


def seeds_of(result: TrialResult) -> set[int]:
    """Return the seeds that the sweep set, or those of the config."""
    swept = {value for path, value in result.point.items() if path.rpartition(".")[2] == "seed"}
    victim: Mapping[str, Any] = result.config.get("victim", {})
    return swept or {int(result.config.get("seed", 0)), int(victim.get("seed", 0))}


def ranges(seeds: Sequence[int]) -> str:
    """Return integers as text: ``0-2``, ``0-2, 7``."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def chosen(results: Sequence[TrialResult]) -> list[Chosen]:
    """Return the best setting of each watermark scheme; empty for a sweep that chooses nothing.

    A setting is a point of the sweep without its seeds. Its metric is the mean over these; a setting whose mean
    violates a constraint is not chosen.
    """
    selection = results[0].selection
    if selection is None or selection.sweep:
        return []
    rows = [
        {
            "scheme": str(result.config.get("victim", {}).get("watermark", {}).get("name", "")),
            "setting": label(result.point),
            **trial_metrics(result, rung),
        }
        for result in results
        if (rung := last_rung(result)) is not None
    ]
    if not rows:
        return []
    return [
        _best(selection, str(scheme), trials) for scheme, trials in pd.DataFrame(rows).groupby("scheme", sort=False)
    ]


def _best(by: SelectionRecord, scheme: str, trials: pd.DataFrame) -> Chosen:
    settings, metrics = trials.groupby("setting", sort=False), list(dict.fromkeys((by.metric, *by.constraints)))
    means = settings[metrics].agg(partial(pd.Series.mean, skipna=False))  # other seeds say nothing of a missing metric
    within = means[by.metric].notna()
    for metric, limit in by.constraints.items():
        within &= means[metric] <= limit
    allowed = means.loc[within, by.metric]
    count = f"{len(means)} settings" if len(means) > 1 else "1 setting"
    tried = f"{count}, {len(allowed)} within the constraints" if by.constraints else count
    if allowed.empty:
        return Chosen(f"{scheme}: none", tried, DASH, DASH)
    name = str(allowed.idxmax() if by.mode == "max" else allowed.idxmin())
    value = f"{by.metric} {percent(allowed[name]) if by.metric != 'queries' else format(allowed[name], ',.0f')}"
    return Chosen(name, tried, value, str(settings.size()[name]))
