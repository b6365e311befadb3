"""Charts of a sweep of many points: curves as bands, the front of proof against cost, parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mea_ray.report import curves
from mea_ray.report.points import PointResult, paths_of
from mea_ray.results.points import setting, short_paths
from mea_ray.results.records import TrialResult

CLOUD = 1_500
"""Maximum number of points in a scatter plot, and of lines in parallel coordinates; more are thinned evenly."""
AXES = 7
"""Maximum number of settings in parallel coordinates, most important first."""
_SHARES = (5, 25, 50, 75, 95)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` of the items, evenly chosen."""
    if len(items) <= most:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, most)]


def bands(results: Sequence[TrialResult], metric: str, identity: str) -> str:
    """Draw how one metric of all trials is distributed at each budget: the median, and the middle 50% and 90%."""
    at: dict[int, list[float]] = {}
    for result in results:
        for rung in result.rungs:
            if (value := curves.value_of(rung.report, metric)) is not None:
                at.setdefault(rung.budget, []).append(value)
    budgets = sorted(at)
    ends: list[float] = list(budgets)
    with curves.style(identity):
        figure = curves.new_figure((4.6, 3.1))
        axes = figure.add_subplot()
        rows = [np.percentile(np.array(at[budget]), _SHARES) for budget in budgets]
        shares = 100 * np.array(rows).reshape(-1, len(_SHARES))
        if len(budgets) == 1:
            ends, shares = [budgets[0], budgets[0] * 1.02], np.repeat(shares, 2, axis=0)  # a band needs a width
        colour = curves.COLOURS[0]
        if budgets:
            axes.fill_between(ends, shares[:, 0], shares[:, 4], color=colour, alpha=0.12, linewidth=0)
            axes.fill_between(ends, shares[:, 1], shares[:, 3], color=colour, alpha=0.22, linewidth=0)
            axes.plot(ends, shares[:, 2], color=colour, linewidth=2, marker="o", markersize=4)
        lowest = float(shares.min()) / 100 if len(shares) else 0.0
        curves.finish_axes(axes, sorted(at), metric, lowest, curves.references(results, metric))
        description = ", ".join(
            f"at {budget:,} queries median {np.median(at[budget]):.1%}, 5% below {np.percentile(at[budget], 5):.1%}"
            for budget in sorted(at)
        )
        return curves.as_svg(figure, identity, curves.METRICS[metric], description or "nothing measured")


def front(points: Sequence[PointResult], best: Sequence[PointResult], identity: str) -> str:
    """Draw the WSR margin of all points against what customers lose, with the Pareto front as a line."""
    known = evenly([point for point in points if point.margin is not None and point.gap is not None], CLOUD)
    with curves.style(identity):
        figure = curves.new_figure((7.6, 4.2))
        axes = figure.add_subplot()
        tones = {"good": curves.COLOURS[2], "mixed": curves.COLOURS[4], "bad": curves.COLOURS[6]}
        for tone, colour in tones.items():
            own = [point for point in known if point.tone == tone]
            axes.plot(
                [100 * (point.gap or 0.0) for point in own],
                [100 * (point.margin or 0.0) for point in own],
                linestyle="none",
                marker="o",
                markersize=3.5,
                markeredgewidth=0,
                color=colour,
                alpha=0.45,
            )
        axes.plot(
            [100 * (point.gap or 0.0) for point in best],
            [100 * (point.margin or 0.0) for point in best],
            color=curves.INK,
            linewidth=1.4,
            marker="D",
            markersize=5,
            drawstyle="steps-post",
        )
        axes.axhline(0, color=curves.MUTED, linewidth=1, zorder=1)
        axes.set_xlabel("accuracy that customers lose (points)", color=curves.MUTED, fontsize=9)
        axes.set_ylabel("WSR above the highest innocent model's (points)", color=curves.MUTED, fontsize=9)
        curves.plain(axes)
        description = "; ".join(
            f"{100 * (p.margin or 0):.1f} points for {100 * (p.gap or 0):.1f}: {p.name}" for p in best[:20]
        )
        return curves.as_svg(figure, identity, "Proof against cost to customers", f"The front: {description}")


def parallel(points: Sequence[PointResult], paths: Sequence[str], identity: str) -> str:
    """Draw every point as a line over its settings, in the colour of its WSR after removals.

    Args:
        points: The points.
        paths: Settings, the most important first; ``AXES`` of them are drawn.
        identity: Unique in the page.
    """
    import matplotlib
    from matplotlib.collections import LineCollection

    known = [point for point in points if point.least is not None or point.wsr is not None]
    drawn = evenly(sorted(known, key=lambda point: point.least or 0.0), CLOUD // 3)
    paths = list(paths)[:AXES]
    short = short_paths(paths_of(points))
    scales = [_scale([point.values.get(path) for point in known]) for path in paths]
    ends = [("WSR", [point.wsr or 0.0 for point in drawn]), ("after removal", [point.least or 0.0 for point in drawn])]
    with curves.style(identity):
        figure = curves.new_figure((max(6.0, 1.5 * (len(paths) + 2)), 4.0))
        axes = figure.add_subplot()
        ramp = matplotlib.colormaps["viridis"]
        highest = max((point.least or 0.0 for point in drawn), default=0.0) or 1.0
        lines, colours = [], []
        for place, point in enumerate(drawn):
            heights = [scale[0](point.values.get(path)) for scale, path in zip(scales, paths, strict=True)]
            heights += [values[place] for _, values in ends]
            lines.append(list(enumerate(heights)))
            # Rounded, so that there are few distinct colours.
            colours.append(ramp(0.1 + 0.85 * round((point.least or 0.0) / highest, 1)))
        # instead of 500 single artists
        axes.add_collection(LineCollection(lines, colors=colours, linewidths=0.7, alpha=0.45))
        names = [short.get(path, path) for path in paths] + [name for name, _ in ends]
        for place, name in enumerate(names):
            axes.axvline(place, color=curves.MUTED, linewidth=1)
            ticks = scales[place][1] if place < len(paths) else [(0.0, "0%"), (0.5, "50%"), (1.0, "100%")]
            for height, text in ticks:
                axes.annotate(
                    text if len(text) < 15 else f"{text[:13]}…",
                    (place, height),
                    xytext=(3, 0),
                    textcoords="offset points",
                    fontsize=7,
                    color="black",
                    va="center",
                    bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
                )
            axes.annotate(name, (place, 1.06), ha="center", fontsize=8, color=curves.INK, annotation_clip=False)
        axes.set_xlim(-0.1, len(names) - 0.5)
        axes.set_ylim(-0.05, 1.12)
        axes.set_axis_off()
        description = f"{len(drawn)} of {len(known)} points over {', '.join(names)}"
        return curves.as_svg(figure, identity, "Parallel coordinates", description)


def _scale(values: Sequence[Any]) -> tuple[Any, list[tuple[float, str]]]:
    """Return a function from a value to its position on an axis from 0 to 1, and the ticks of that axis."""
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if numbers and len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        logarithmic = low > 0 and high / low >= 50
        to = np.log10 if logarithmic else float
        span = (to(high) - to(low)) or 1.0
        middle = (low * high) ** 0.5 if logarithmic else (low + high) / 2
        ticks = [(float((to(value) - to(low)) / span), f"{value:.3g}") for value in (low, middle, high)]
        return lambda value: float((to(float(value)) - to(low)) / span), ticks
    names = sorted({setting(value) for value in values})
    step = 1 / max(1, len(names) - 1)
    places = {name: place * step for place, name in enumerate(names)}
    ticks = [(height, name) for name, height in places.items()]
    return lambda value: places[setting(value)], ticks[:: max(1, len(ticks) // 12)]
