"""The progress of the thieves (the curves that attacks log), and the owner's view of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mea_ray.report import curves, tables
from mea_ray.results.points import label
from mea_ray.results.records import TrialResult
from mea_ray.tracking.rows import thinned

Line = list[tuple[int, float]]
"""(queries so far, value), ascending in queries."""

TRIALS = 4
"""Maximum number of trials whose curves are shown."""
LOG_ROWS = 40
"""Maximum number of clients in the table of the query log."""
POINTS = 200
"""Maximum number of points of a line; more cannot be distinguished in a small picture."""
COMPONENT = "/"
"""Lines ``reward``, ``reward/certainty`` and ``reward/loss`` share a picture."""


def charts(curves_of_a_rung: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, dict[str, Line]]:
    """Group the lines of an attack into charts.

    Args:
        curves_of_a_rung: Points by name, as in ``RungResult.curves``.

    Returns:
        Lines by name, by the title of their chart; "" names the line with the chart's name. At most
        ``curves.MAX_LINES`` per chart, those that end highest.
    """
    panels: dict[str, dict[str, Line]] = {}
    for name, points in curves_of_a_rung.items():
        if points:
            title, of_several, line = name.rpartition(COMPONENT)
            panels.setdefault(title if of_several else name, {})[line if of_several else ""] = thinned(points, POINTS)
    for title, lines in panels.items():
        highest = sorted(lines, key=lambda line: lines[line][-1][1], reverse=True)[: curves.MAX_LINES]
        panels[title] = {line: points for line, points in lines.items() if line in highest}
    return panels


def pictures(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Return the charts of the trials whose attack logged curves: one trial per point of the sweep.

    Returns:
        For each trial ``name``, and ``panels`` with ``title``, ``note``, ``legend`` and ``svg``.
    """
    from markupsafe import Markup

    entries: list[dict[str, Any]] = []
    for name, trials in tables.grouped(results).items():
        known = next((trial for trial in trials if trial.rungs and any(trial.rungs[-1].curves.values())), None)
        if known is None or len(entries) == TRIALS:
            continue
        panels = []
        logged = known.rungs[-1].curves
        for position, (title, lines) in enumerate(charts(logged).items()):
            of_all = sum((name.rpartition(COMPONENT)[0] or name) == title for name in logged)
            panels.append(
                {
                    "title": title,
                    "note": f"the {len(lines)} of {of_all} that end highest" if of_all > len(lines) else "",
                    "legend": [{"name": name, "colour": f"c{i}"} for i, name in enumerate(lines)] if any(lines) else [],
                    "svg": Markup(svg(title, lines, f"a{len(entries)}-{position}")),  # text escaped in curves.as_svg
                }
            )
        entries.append({"name": name, "panels": panels})
    return entries


def svg(title: str, lines: Mapping[str, Line], identity: str) -> str:
    """Draw one small line chart over the queries; see ``curves.svg``."""
    with curves.style(identity):
        figure = curves.new_figure((4.6, 2.5))
        axes = figure.add_subplot()
        for position, points in enumerate(lines.values()):
            queries, values = zip(*points, strict=True)
            marker = "o" if len(points) == 1 else ""
            axes.plot(queries, values, color=curves.COLOURS[position], linewidth=1.6, marker=marker)
        axes.set_xlabel("queries (images answered)", color=curves.MUTED, fontsize=9)
        curves.plain(axes)
        described = [
            f"{name or title}: {points[0][1]:.3g} at {points[0][0]:,} queries, {points[-1][1]:.3g} at {points[-1][0]:,}"
            for name, points in lines.items()
        ]
        return curves.as_svg(figure, identity, title, "; ".join(described))


@dataclass(frozen=True)
class ClientRow:
    """One row of the query log's table, as display texts."""

    point: str
    client: str
    account: str
    requests: str
    images: str
    marked: str
    flagged: str
    distances: str
    w: str
    alarm: str
    alarmed: bool
    classes: Any
    shape: Any


def client_rows(results: Sequence[TrialResult]) -> list[ClientRow]:
    """Return the owner's view of each client, at most ``LOG_ROWS`` of them."""
    from markupsafe import Markup

    lines = []
    for trial in results:
        for number, (client, log) in enumerate(trial.query_log.items(), start=1):
            words = {None: "not judged", True: "alarm", False: "no alarm"}
            low, high = log.distance_range or (0.0, 0.0)
            of = f"distances from {low:.3g} to {high:.3g}" if log.distance_range else "no distances"
            lines.append(
                ClientRow(
                    point=label(trial.point, seeds=True),
                    client=client,
                    account=f"{number} of {len(trial.query_log)}",
                    requests=f"{log.requests:,}",
                    images=f"{log.images:,}",
                    marked=f"{log.marked:,}",
                    flagged=f"{log.flagged:,}",
                    distances=f"{log.distances:,}",
                    w=tables.DASH if log.shapiro_w is None else f"{log.shapiro_w:.3f}",
                    alarm=words[log.alarm],
                    alarmed=bool(log.alarm),
                    classes=Markup(bars(log.classes, "answers per predicted class")),
                    shape=Markup(bars(log.distance_counts, of)),
                )
            )
    return lines[:LOG_ROWS]


def clients(results: Sequence[TrialResult]) -> int:
    """Return the number of clients in all query logs."""
    return sum(len(trial.query_log) for trial in results)


def bars(counts: Sequence[int], title: str) -> str:
    """Draw a histogram as a tiny ``<svg>``, with its numbers as text for screen readers."""
    if not counts:
        return tables.DASH
    width, height, most = 140.0, 28.0, max(max(counts), 1)
    each = width / len(counts)
    about = f"{title}: {', '.join(map(str, counts[:100]))}{', ...' if len(counts) > 100 else ''}"
    rectangles = "".join(
        f'<rect x="{place * each:.1f}" y="{height * (1 - count / most):.1f}" width="{0.85 * each:.1f}" '
        f'height="{height * count / most:.1f}"/>'
        for place, count in enumerate(counts)
    )
    return (
        f'<svg class="bars" viewBox="0 0 {width:g} {height:g}" role="img"><title>{escape(about)}</title>'
        f"{rectangles}</svg>"
    )
