"""One self-contained HTML file per sweep: no network, no scripts, readable in light and dark and by a screen reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_ray.report import (
    attacks,
    curves,
    detections,
    front,
    leaning,
    removals,
    samples,
    seeds,
    selection,
    settings,
    statistics,
    tables,
    verdict,
)
from mea_ray.report import search as searches
from mea_ray.report.record import command_of
from mea_ray.results.records import TrialResult, read_results
from mea_ray.storage.files import write_whole

if TYPE_CHECKING:
    from mea_ray.config import SearchConfig

GALLERIES = 4
"""Victims whose samples are shown; a sweep may have hundreds."""


def render(
    results: Sequence[TrialResult],
    *,
    name: str,
    description: str = "",
    storage: str | Path | None = None,
    folder: Path | None = None,
    search: SearchConfig | None = None,
    command: str = "",
) -> str:
    """Return the report as HTML.

    Args:
        results: At least one trial.
        name: Name of the sweep or experiment.
        description: One paragraph for the reader.
        storage: Where victims are kept; the one that the sweep was started with when None.
        folder: The sweep's folder, which knows where its data and victims are.
        search: What the sweep sought, if it sought something.
        command: The command that made the results, if it is known.
    """
    import jinja2
    from markupsafe import Markup

    varied = settings.varied(results)
    results = tables.with_short_points(results)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mea_ray.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    first: dict[str, TrialResult] = {}
    for result in results:
        first.setdefault(result.victim, result)
    values: dict[str, Any] = {
        "name": name,
        "description": description,
        "summaries": verdict.summaries(results),
        "selection": selection.sentence(results),
        "chosen_headings": selection.HEADINGS,
        "chosen": selection.chosen(results),
        "threshold": tables.percent(verdict.threshold(results), 0),
        "significance": f"{verdict.significance(results):g}",
        "figures": [_figure(chunk, position) for position, chunk in enumerate(_chunks(results))],
        "seeds": max(len(trials) for trials in tables.grouped(results).values()),
        "headings": tables.HEADINGS,
        "rows": tables.rows(results),
        "means": seeds.lines(results),
        "means_headings": seeds.HEADINGS,
        "means_caption": seeds.CAPTION,
        "found": searches.found(search, results) if search is not None else None,
        "costs": tables.costs(results),
        "statistic_headings": statistics.HEADINGS,
        "statistics": statistics.lines(results),
        "removal_headings": removals.HEADINGS,
        "removals": removals.lines(results),
        "planes": removals.figures(results),
        "detection_headings": detections.HEADINGS,
        "detections": detections.lines(results),
        "front": front.figure(results),
        "front_headings": front.HEADINGS,
        "front_lines": front.lines(results),
        "front_caption": front.CAPTION,
        "leaning_headings": leaning.HEADINGS,
        "leaning": leaning.lines(results),
        "leaning_caption": leaning.CAPTION,
        "triggers": detections.pictures(results),
        "attacks": attacks.pictures(results),
        "seen": attacks.client_rows(results),
        "clients": attacks.clients(results),
        "galleries": [samples.gallery(result, storage, folder) for result in list(first.values())[:GALLERIES]],
        "victims": len(first),
        "changed": settings.changed(results),
        "varied": varied,
        "machines": settings.machines(results),
        "provenance": settings.provenance(results),
        "command": command,
        "trials": len(results),
        "queries": sum(result.queries_charged for result in results),
        "seconds": sum(result.seconds for result in results),
        "css": Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),  # ours, not the user's
        "percent": tables.percent,
    }
    return environment.get_template("report.html.j2").render(values)


def _chunks(results: Sequence[TrialResult]) -> list[dict[str, list[TrialResult]]]:
    groups = tables.grouped(results)
    prefix = tables.common_prefix(list(groups))
    return curves.chunks({name.removeprefix(prefix): trials for name, trials in groups.items()})


def _figure(groups: dict[str, list[TrialResult]], position: int) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "legend": [{"name": name, "colour": f"c{i}", "marker": curves.GLYPHS[i]} for i, name in enumerate(groups)],
        "panels": [
            {
                "title": title,
                "svg": Markup(curves.svg(groups, metric, f"f{position}-{metric}")),
            }  # text escaped in svg()
            for metric, title in curves.METRICS.items()
        ],
    }


def write(folder: Path, *, storage: str | Path | None = None, png: Path | None = None) -> Path:
    """Render ``report.html`` into a sweep's folder from its ``results/*.json``.

    Args:
        folder: The sweep's folder; ``sweep.yaml`` in it, if there, gives name and description.
        storage: Where victims are kept; the one that the sweep was started with when None.
        png: Where to write the curves as one picture, too.

    Returns:
        Path of the report.

    Raises:
        ArtifactError: There are no results, or one of them is damaged.
    """
    results = read_results(folder)
    about = _about(folder)
    text = render(
        results,
        name=str(about.get("name") or folder.resolve().name),
        description=str(about.get("description") or ""),
        storage=storage,
        folder=folder,
        search=searches.search_of(folder),
        command=command_of(folder),
    )
    path = folder / "report.html"
    write_whole(path, text)
    if png is not None:
        curves.png(_chunks(tables.with_short_points(results))[0], png)
    return path


def _about(folder: Path) -> dict[str, Any]:
    from mea_ray.config import load_tree
    from mea_ray.core.errors import ConfigError

    try:
        return load_tree(folder / "sweep.yaml")
    except ConfigError:  # results that were copied without their sweep still make a report
        return {}
