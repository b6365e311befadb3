"""The front: what each mark costs customers, what it gives away, and how often it proves a theft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd

from mea_ray.report import curves
from mea_ray.report.tables import DASH, Cost, Judgements, common_prefix, costs, mean
from mea_ray.results.points import is_seed, label, setting
from mea_ray.results.records import RungResult, TrialResult
from mea_ray.verification.evidence import judge_rungs

HEADINGS = {
    "mark": "Mark",
    "lost": "Accuracy lost",
    "worst": "Worst source class",
    "calibration": "Calibration error",
    "leak": "Key's rank by answers",
    "budget": "Queries",
    "above": "Above all innocent models",
    "first": "Key leads",
    "proved": "Thefts proved",
    "least": "Fewest proved",
    "thief": "Against",
}
"""Heading of each column of ``FrontRow``, in display order."""
CAPTION = (
    "Accuracy lost, and that of the source class that loses most: null models less victim, in points. Calibration "
    "error: victim less null models. Both are means over victims. Key's rank by answers: the best of all victims, "
    "as an outsider ranks it with the most answers. Above all innocent models: thefts whose statistic is larger "
    "than that of every null model, and of every one stolen with the same budget. Key leads: thefts in which it "
    "ranks before all other keys. Thefts proved: at the corrected level, over all seeds and thieves. Fewest proved: "
    "of the thief against whom the mark does worst."
)
_OWNERS = {"data", "splits", "victim", "service", "verification"}
"""Sections of a config that the owner controls."""


@dataclass(frozen=True)
class Mark:
    """One mark at one budget.

    Attributes:
        name: The sweep's settings of the owner's sections, without seeds.
        budget: Queries of the thieves.
        lost: Accuracy that customers lose, in percentage points, mean over victims; negative for a gain. None without
            null models.
        worst: The same for the source class that loses most; None for a scheme without source classes.
        calibration: Increase of the expected calibration error.
        rank: Best rank of the key among all keys, from 1, over the victims; None where it cannot be computed.
        keys: Number of keys among which it is ranked.
        above: Number of thefts whose statistic is above that of every null model, stolen with the same budget or not.
        first: Number of thefts where the key ranks before all other admissible keys; None where keys are not ranked.
        proved: For each thief, the numbers of proved thefts and of all thefts.
    """

    name: str
    budget: int
    lost: float | None
    worst: float | None
    calibration: float | None
    rank: int | None
    keys: int | None
    above: int
    first: int | None
    proved: dict[str, tuple[int, int]]

    @property
    def power(self) -> float:
        """Fraction of proved thefts."""
        return self.counts[0] / self.counts[1]

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of proved thefts and of all thefts."""
        return sum(done for done, _ in self.proved.values()), sum(of for _, of in self.proved.values())

    @property
    def least(self) -> tuple[str, float]:
        """The thief with the smallest fraction of proved thefts, and that fraction."""
        return min(((thief, done / of) for thief, (done, of) in self.proved.items()), key=lambda pair: pair[1])


@dataclass(frozen=True)
class FrontRow:
    """One row of the table, as display texts."""

    mark: str
    lost: str
    worst: str
    calibration: str
    leak: str
    budget: str
    above: str
    first: str
    proved: str
    least: str
    thief: str


def marks(results: Sequence[TrialResult]) -> list[Mark]:
    """Return every mark at every budget, in the order of the sweep; empty unless the sweep compares several marks."""
    groups: dict[str, list[TrialResult]] = {}
    for result in results:
        if result.victim_report.wsr is not None:
            groups.setdefault(_of_owner(result), []).append(result)
    if len(groups) < 2:
        return []
    judged, called = judge_rungs(results), _thieves(results)
    prefix = common_prefix(list(groups))
    drawn = []
    for name, trials in groups.items():
        paid, (rank, keys) = costs(trials), _leak(trials)
        for budget, thefts in _thefts(trials, judged, called).groupby("budget"):
            proved = thefts.groupby("thief", sort=False)["proved"].agg(["sum", "count"])
            drawn.append(
                Mark(
                    name=name.removeprefix(prefix),
                    budget=int(cast(int, budget)),
                    lost=mean([None if cost.points is None else -cost.points for cost in paid]),
                    worst=mean([_worst(cost) for cost in paid]),
                    calibration=mean([_less(cost.calibration, cost.null_calibration) for cost in paid]),
                    rank=rank,
                    keys=keys,
                    above=int(thefts["above"].sum()),
                    first=int(thefts["first"].sum()) if thefts["first"].notna().any() else None,
                    proved={str(thief): (int(done), int(of)) for thief, done, of in proved.itertuples()},
                )
            )
    return drawn


def _thefts(trials: Sequence[TrialResult], judged: Judgements, called: Mapping[str, str]) -> pd.DataFrame:
    """Return one row for each judged theft: ``budget``, ``thief``, ``proved``, ``above``, ``first`` (None: no rank)."""
    rows = []
    for result in trials:
        for rung in result.rungs:
            if (judgement := judged.get((result.trial, rung.budget))) is None:
                continue
            rank = rung.report.key_ranks.get(result.statistic or "wsr")
            first = None if rank is None else rank.at_least == 0
            proved = judgement.verdict == "proved"
            rows.append((rung.budget, called[result.trial], proved, _is_above(result, rung), first))
    return pd.DataFrame(rows, columns=["budget", "thief", "proved", "above", "first"])


def _is_above(result: TrialResult, rung: RungResult) -> bool:
    """Return whether a theft's statistic is above those of all innocent models; False if there is none."""
    innocent = [*result.null_reports, *(each.report for each in result.stolen_nulls if each.budget == rung.budget)]
    name = result.statistic or "wsr"
    own = rung.report.statistics.get(name)
    known = [report.statistics[name] for report in innocent if name in report.statistics]
    return own is not None and bool(known) and own > max(known)


def _of_owner(result: TrialResult) -> str:
    return label({path: value for path, value in result.point.items() if path.split(".")[0] in _OWNERS})


def _thieves(results: Sequence[TrialResult]) -> dict[str, str]:
    """Return the label of each trial's thief: the settings, without seeds, in which it differs from other thieves."""
    settings = {result.trial: _flat(result.point) for result in results}
    known = [{path: setting(value) for path, value in each.items()} for each in settings.values()]
    shared = {path for path, text in known[0].items() if all(each.get(path) == text for each in known)}
    own = {name: {path: v for path, v in each.items() if path not in shared} for name, each in settings.items()}
    return {name: label(each) if each else "plain" for name, each in own.items()}


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point in which a group that was set as a whole (``thief``) has one path per setting."""
    flat: dict[str, Any] = {}
    for path, value in point.items():
        if path.split(".")[0] in _OWNERS or is_seed(path):
            continue
        if isinstance(value, Mapping) and "name" not in value:
            flat |= _flat({f"{path}.{key}": inner for key, inner in value.items()})
        else:
            flat[path] = value
    return flat


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _worst(cost: Cost) -> float | None:
    """Return the loss of the source class that loses most, in percentage points."""
    lost = [100 * (null - own) for own, null in cost.source_accuracy.values() if null is not None]
    return max(lost, default=None)


def _leak(trials: Sequence[TrialResult]) -> tuple[int | None, int | None]:
    """Return the best rank of the owner's key from the most answers, and the number of keys."""
    last = [result.leaning[-1] for result in trials if result.leaning]
    named = [record.signal or record.victim for record in last]
    ranks = [each.true_rank for each in named if each is not None and each.true_rank is not None]
    if not ranks:
        return None, None
    return min(rank.at_least for rank in ranks) + 1, ranks[0].references + 1


def lines(results: Sequence[TrialResult]) -> list[FrontRow]:
    """Return the table of all marks; empty unless the sweep compares several."""
    return [_row(mark) for mark in marks(results)]


def _row(mark: Mark) -> FrontRow:
    thief, least = mark.least
    done, of = mark.counts
    return FrontRow(
        mark=mark.name,
        lost=_points(mark.lost),
        worst=_points(mark.worst),
        calibration=DASH if mark.calibration is None else f"{mark.calibration:+.3f}",
        leak=DASH if mark.rank is None else f"{mark.rank} of {mark.keys:,}",
        budget=f"{mark.budget:,}",
        above=f"{mark.above} of {of}",
        first=DASH if mark.first is None else f"{mark.first} of {of}",
        proved=f"{done} of {of}",
        least=f"{100 * least:.0f}%",
        thief=thief if len(mark.proved) > 1 else DASH,
    )


def _points(value: float | None) -> str:
    return DASH if value is None else f"{value:+.1f}"


def figure(results: Sequence[TrialResult]) -> dict[str, Any] | None:
    """Return the picture of the front at the largest budget; None unless the sweep compares several marks.

    Returns:
        ``legend`` and ``svg``: accuracy lost against thefts proved, with a line down to the smallest fraction over the
        thieves.
    """
    from markupsafe import Markup

    all_marks = marks(results)
    most = max((mark.budget for mark in all_marks), default=0)
    selected = [mark for mark in all_marks if mark.budget == most and mark.lost is not None][: curves.MAX_LINES]
    if not selected:
        return None
    legend = [{"name": m.name, "colour": f"c{i}", "marker": curves.GLYPHS[i]} for i, m in enumerate(selected)]
    return {"budget": f"{most:,}", "legend": legend, "svg": Markup(svg(selected, "front"))}


def svg(selected: Sequence[Mark], identity: str) -> str:
    """Draw marks with a known ``lost``, at most ``curves.MAX_LINES``; see ``curves.svg``."""
    with curves.style(identity):
        drawing = curves.new_figure((5.6, 3.6))
        axes = drawing.add_subplot()
        for place, mark in enumerate(selected):
            colour, marker, at = curves.COLOURS[place], curves.MARKERS[place], [mark.lost or 0.0] * 2
            axes.plot(at, [100 * mark.least[1], 100 * mark.power], color=colour, linewidth=1.4)
            axes.plot(at[:1], [100 * mark.power], color=colour, marker=marker, markersize=6, linestyle="none")
        axes.axvline(0, color=curves.MUTED, linewidth=1, zorder=1)
        axes.set_ylim(-4, 104)
        axes.set_xlabel("accuracy that customers lose (points)", color=curves.MUTED, fontsize=9)
        axes.set_ylabel("thefts proved (%)", color=curves.MUTED, fontsize=9)
        curves.plain(axes)
        described = [
            f"{m.name}: {100 * m.power:.0f}% proved, at least {100 * m.least[1]:.0f}%, for {m.lost:.1f} points"
            for m in selected
        ]
        return curves.as_svg(drawing, identity, "Marks by cost and proof", "; ".join(described))
