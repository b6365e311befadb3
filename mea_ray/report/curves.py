"""Robustness curves: queries on the x axis; WSR, WFPR, accuracy and fidelity of the stolen model on the y axis.

One small chart per metric, as inline SVG whose colours are CSS variables (so that it follows a light or a dark page)
and whose texts remain texts; and all four in one PNG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mea_ray.report.tables import percent
from mea_ray.report.verdict import threshold
from mea_ray.results.records import ModelReport, TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {
    "wsr": "Watermark success rate (WSR)",
    "wfpr": "False positives on other mixes (WFPR)",
    "accuracy": "Accuracy of the stolen model",
    "fidelity": "Fidelity to the victim",
}
"""Title of the chart of each metric."""
MAX_LINES = 8
"""Maximum number of lines in one chart; further lines go to further charts."""
COLOURS = ("#0a6fb8", "#d1570a", "#0f8a5f", "#b03a8c", "#8a6d00", "#5b4bc4", "#c22f3d", "#4a6572")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")
"""The markers as characters, for text legends."""
INK, MUTED, GRID = "#1d2327", "#5d6970", "#dde3e6"


@dataclass(frozen=True)
class Point:
    """One point of a curve: the trials of one group at one budget.

    Attributes:
        budget: The budget.
        queries: Mean number of images charged.
        mean: Mean over the trials, in [0, 1].
        low: Lower end of the interval; ``mean`` without an interval.
        high: Upper end of it.
        values: The values of the trials.
    """

    budget: int
    queries: float
    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def value_of(report: ModelReport, metric: str) -> float | None:
    """Return one of ``METRICS`` of a report, or None if it was not measured."""
    if metric == "wsr":
        return report.wsr.rate if report.wsr else None
    return {"wfpr": report.wfpr_mean, "accuracy": report.accuracy, "fidelity": report.fidelity}[metric]


def spread(values: Sequence[float], report: ModelReport, metric: str) -> tuple[float, float]:
    """Return the interval to draw as a band.

    Three or more trials: 95 % Student interval of their mean. Two: the range between them (a Student interval of two
    numbers is meaningless). One: the Wilson interval of its WSR, and zero width for the other metrics.
    """
    centre = fmean(values)
    if len(values) >= 3:
        from scipy.stats import t

        if len(set(values)) == 1:
            return centre, centre
        low, high = t.interval(0.95, len(values) - 1, loc=centre, scale=stdev(values) / sqrt(len(values)))
        return max(0.0, float(low)), min(1.0, float(high))
    if len(values) == 2:
        return min(values), max(values)
    if metric == "wsr" and report.wsr is not None:
        return report.wsr.low, report.wsr.high
    return centre, centre


def series(trials: Sequence[TrialResult], metric: str) -> list[Point]:
    """Return the curve of one group of trials, points by ascending budget."""
    points = []
    for budget in sorted({rung.budget for trial in trials for rung in trial.rungs}):
        rungs = [rung for trial in trials for rung in trial.rungs if rung.budget == budget]
        known = [(rung, value) for rung in rungs if (value := value_of(rung.report, metric)) is not None]
        if known:
            values = tuple(value for _, value in known)
            low, high = spread(values, known[0][0].report, metric)
            points.append(Point(budget, fmean(rung.queries for rung, _ in known), fmean(values), low, high, values))
    return points


def references(trials: Sequence[TrialResult], metric: str) -> dict[str, float]:
    """Return the horizontal lines of a chart: threshold, victim and null models, where they apply."""
    lines = {}
    if metric in {"wsr", "wfpr"}:
        lines["threshold"] = threshold(trials)
    if metric != "fidelity":
        victims = [v for t in trials if (v := value_of(t.victim_report, metric)) is not None]
        nulls = [v for t in trials for n in t.null_reports if (v := value_of(n, metric)) is not None]
        if victims:
            lines["victim"] = fmean(victims)
        if nulls:
            lines["null"] = fmean(nulls)
    return lines


def chunks(groups: Mapping[str, list[TrialResult]]) -> list[dict[str, list[TrialResult]]]:
    """Split the groups so that no chart has more than ``MAX_LINES`` lines."""
    names = list(groups)
    return [{n: groups[n] for n in names[i : i + MAX_LINES]} for i in range(0, len(names), MAX_LINES)]


def svg(groups: Mapping[str, list[TrialResult]], metric: str, identity: str) -> str:
    """Draw one chart as an ``<svg>`` element with a title and a description for screen readers.

    Args:
        groups: Trials by the name of their line; at most ``MAX_LINES``.
        metric: One of ``METRICS``.
        identity: Unique in the page; prefixes the element's ids.
    """
    with style(identity):
        figure = new_figure((4.6, 3.1))
        _panel(figure.add_subplot(), groups, metric, legend=False)
        return as_svg(figure, identity, METRICS[metric], describe(groups, metric))


def style(identity: str) -> AbstractContextManager[None]:
    """Return matplotlib's settings for ``as_svg``: texts remain texts, and ids are derived from ``identity``."""
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": identity, "font.size": 10})


def as_svg(figure: Figure, identity: str, title: str, about: str) -> str:
    """Return a figure as an ``<svg>`` element in the page's own colours and font; call it within ``style``.

    Args:
        figure: Drawn in ``INK``, ``MUTED``, ``GRID`` and ``COLOURS``.
        identity: Unique in the page.
        title: Its title, as text.
        about: A description for screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: [^\"';]*?(\d+)px [^\"';]*(?:'[^']*'[^\"';]*)*", r"font: \1px var(--font)", text)
    names = {INK: "ink", MUTED: "muted", GRID: "grid", **{c: f"c{i}" for i, c in enumerate(COLOURS)}}
    for colour, name in names.items():
        text = text.replace(colour, f"var(--{name})")
    head, _, body = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    title, about = escape(title), escape(about)
    head += f' role="img" aria-labelledby="{identity}-title {identity}-about">'
    return f'{head}<title id="{identity}-title">{title}</title><desc id="{identity}-about">{about}</desc>{body}'


def png(groups: Mapping[str, list[TrialResult]], path: Path) -> None:
    """Write the curves of all metrics into one PNG."""
    _all_panels(groups).savefig(path, format="png", dpi=110, facecolor="white", metadata={"Software": None})


def sheet(groups: Mapping[str, list[TrialResult]], identity: str, digest: str) -> str:
    """Return the curves of all metrics as one SVG file on a white background, for pages without our style sheet.

    Args:
        groups: Trials by the name of their line; at most ``MAX_LINES``.
        identity: Prefix of the element's ids.
        digest: Digest of the data; written into the file, so that an out-of-date page can be detected.
    """
    with style(identity):
        buffer = io.StringIO()
        _all_panels(groups).savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return f"<!-- drawn from {digest} -->\n{text[text.index('<svg') :]}"


def _all_panels(groups: Mapping[str, list[TrialResult]]) -> Figure:
    figure = new_figure((10.0, 7.0))
    for position, metric in enumerate(METRICS, start=1):
        _panel(figure.add_subplot(2, 2, position), groups, metric, legend=position == 1, title=METRICS[metric])
    return figure


def describe(groups: Mapping[str, list[TrialResult]], metric: str) -> str:
    """Return a description of a chart: its alternative text."""
    parts = []
    for name, trials in groups.items():
        points = series(trials, metric)
        if points:
            listed = ", ".join(f"{percent(point.mean)} at {point.queries:,.0f} queries" for point in points)
            parts.append(f"{name}: {listed}")
    all_trials = [trial for trials in groups.values() for trial in trials]
    lines = [f"{name} {percent(value)}" for name, value in references(all_trials, metric).items()]
    return "; ".join(parts or ["nothing measured"]) + (f". Lines: {', '.join(lines)}." if lines else ".")


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _panel(
    axes: Axes, groups: Mapping[str, list[TrialResult]], metric: str, *, legend: bool, title: str | None = None
) -> None:
    ends = set()
    lowest = 1.0
    for position, (name, trials) in enumerate(groups.items()):
        points = series(trials, metric)
        if not points:
            continue
        colour, marker = COLOURS[position % MAX_LINES], MARKERS[position % MAX_LINES]
        queries = [point.queries for point in points]
        ends |= set(queries)
        low, high = [100 * p.low for p in points], [100 * p.high for p in points]
        if len(points) > 1:
            axes.fill_between(queries, low, high, color=colour, alpha=0.16, linewidth=0)
        else:
            axes.vlines(queries, low, high, color=colour, alpha=0.5, linewidth=4)
        axes.plot(queries, [100 * p.mean for p in points], color=colour, linewidth=1.8, label=name)
        for point in points:
            axes.plot(
                [point.queries] * len(point.values),
                [100 * value for value in point.values],
                linestyle="none",
                marker=marker,
                markersize=5,
                markerfacecolor=colour,
                markeredgewidth=0,
                alpha=0.85,
            )
        lowest = min([lowest, *(p.low for p in points), *(v for p in points for v in p.values)])
    finish_axes(axes, sorted(ends), metric, lowest, references([t for g in groups.values() for t in g], metric))
    if title:
        axes.set_title(title, color=INK, fontsize=11, loc="left")
    if legend:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def finish_axes(axes: Axes, queries: Sequence[float], metric: str, lowest: float, lines: Mapping[str, float]) -> None:
    """Set the limits, ticks, reference lines and labels of a chart of one metric over queries."""
    from matplotlib.ticker import MaxNLocator

    floor = 0.0
    if metric in {"accuracy", "fidelity"}:  # differences of a few points matter here, so the axis need not start at 0
        floor = max(0.0, 10 * ((100 * min([lowest, *lines.values()]) - 5) // 10))
    top = 100.0 if floor else 102.0
    axes.set_ylim(floor, top)
    styles: dict[str, Any] = {"threshold": (0, (6, 3)), "victim": "solid", "null": (0, (1, 2))}
    for name, height in apart({name: 100 * value for name, value in lines.items()}, 0.06 * (top - floor)).items():
        axes.axhline(100 * lines[name], color=MUTED, linewidth=1, linestyle=styles[name], zorder=1)
        axes.annotate(
            f"{name} {percent(lines[name], 0 if name == 'threshold' else 1)}",
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=MUTED,
        )
    if len(queries) > 1 and queries[-1] >= 8 * queries[0]:
        axes.set_xscale("log")
    if queries:
        axes.minorticks_off()
        axes.set_xticks(queries, [_short(q) for q in queries])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    axes.set_xlabel("queries (images answered)", color=MUTED, fontsize=9)
    plain(axes)


def plain(axes: Axes) -> None:
    """Keep only the necessary parts of the frame, in the page's colours."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(MUTED)


def apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move labels up, in their order, until no two are nearer than ``gap``."""
    placed: dict[str, float] = {}
    last = float("-inf")
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        last = placed[name] = max(height, last + gap)
    return placed


def _short(queries: float) -> str:
    thousands = queries / 1000
    return f"{thousands:g}k" if queries >= 1000 and thousands == round(thousands, 1) else f"{queries:.0f}"
