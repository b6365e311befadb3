"""The page of a sweep of many points, instead of one curve and one row per point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mea_ray.report import curves, point_figures, points, rung_table, tables
from mea_ray.report.cells import Cell, Line, plain
from mea_ray.report.points import PointResult
from mea_ray.results.points import short_paths
from mea_ray.results.records import TrialResult

FRONT_LINES = 20
"""Maximum number of listed points of the front."""
POINT_HEADINGS = (
    "Point",
    "Verdict",
    "WSR",
    "Margin",
    "After removal",
    "Substitute accuracy",
    "Customers lose",
    "Seeds",
)


def values(
    results: Sequence[TrialResult], judged: tables.Judgements, table: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the values for the template's part for many points.

    Args:
        results: The trials, with their points as the sweep set them.
        judged: Judgements on their substitutes.
        table: From ``rung_table.lines``.
    """
    from markupsafe import Markup

    ranked = points.point_results(results, judged)
    in_order, front = points.ranked(ranked), points.front(ranked)
    settings, short = points.importances(ranked), short_paths(points.paths_of(ranked))
    edge = min(points.EDGE, len(ranked) // 2)
    return {
        "points": len(ranked),
        "point_headings": POINT_HEADINGS,
        "best": [point_line(point) for point in in_order[:edge]],
        "worst": [point_line(point) for point in in_order[::-1][:edge]],
        "best_marks": [point_line(point) for point in front[:FRONT_LINES]],
        "best_marks_more": more(len(front), FRONT_LINES),
        "best_marks_svg": Markup(point_figures.front(ranked, front, "best-marks")),
        "bands": [
            {"title": title, "svg": Markup(point_figures.bands(results, metric, f"b-{metric}"))}
            for metric, title in curves.METRICS.items()
        ],
        "importance_headings": ("Setting", *points.OBJECTIVES),
        "importances": plain(
            (path, *(tables.DASH if value != value else tables.percent(value, 0) for value in of.values()))
            for path, of in settings
        ),
        "parallel_svg": Markup(point_figures.parallel(ranked, [path for path, _ in settings], "parallel"))
        if settings
        else "",
        "marginal_headings": points.MARGINAL_HEADINGS,
        "marginals": [
            {"path": path, "lines": plain(line.cells for line in points.marginals(ranked, path))} for path in short
        ],
        "csv": CSV,
        "rungs": Markup(rung_table.as_json(table)),  # safe in a <script>
        "script": Markup((Path(__file__).parent / "table.js").read_text(encoding="utf-8")),  # ours, not the user's
    }


CSV = "report.csv"
"""Name of the CSV file with the page's table of results."""


def more(count: int, edge: int) -> str:
    """Return a sentence on omitted rows; empty if there are none."""
    return f" The first {edge} of {count:,}." if count > edge else ""


def point_cells(point: PointResult) -> tuple[str, ...]:
    """Return the texts of a point, in the order of ``POINT_HEADINGS``."""
    margin = tables.DASH if point.margin is None else f"{100 * point.margin:+.1f}"
    gap = tables.DASH if point.gap is None else f"{100 * point.gap:.1f}"
    rates = (tables.percent(point.wsr), margin, tables.percent(point.least), tables.percent(point.accuracy))
    return (point.name, point.verdict or tables.DASH, *rates, gap, str(len(point.trials)))


def point_line(point: PointResult) -> Line:
    """Return the row of a point, with its verdict in colour; the tooltip lists its first trials."""
    cells = [Cell(text) for text in point_cells(point)]
    cells[1] = Cell(cells[1].text, f"text {point.tone}")
    return Line(tuple(cells), f"trial {', '.join(point.trials[:4])}")
