"""One self-contained HTML file per sweep: no network, readable in light and dark mode and by screen readers.

A sweep of up to ``tables.MANY`` points is shown point by point, without a script. A larger one is summarised, and a
script in the page sorts and filters the table of its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_ray.config import PricesConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.report import (
    attacks,
    curves,
    detections,
    front,
    leakage,
    many_points,
    removals,
    rung_table,
    samples,
    seeds,
    selection,
    settings,
    spending,
    statistics,
    tables,
    verdict,
)
from mea_ray.report import search as searches
from mea_ray.report.cells import Cell, Line, of_rows, plain
from mea_ray.report.record import command_of
from mea_ray.results.points import setting
from mea_ray.results.records import TrialResult, read_results
from mea_ray.storage.files import write_whole
from mea_ray.verification import evidence

if TYPE_CHECKING:
    from mea_ray.config import SearchConfig

CSV = many_points.CSV
"""Name of the CSV file with the table of a page of many points."""
GALLERIES = 4
"""Maximum number of victims whose samples are shown."""
LINES = 40
"""Maximum number of rows of a table of victims, detections or answers in a report of many points."""
COST_HEADINGS = (
    "Victim",
    "Accuracy",
    "Difference",
    "Calibration error",
    "Target probability on sources",
    "Accuracy on the source classes",
)
SEEN_HEADINGS = {
    "point": "Thief",
    "account": "Account",
    "requests": "Requests",
    "images": "Images",
    "marked": "Marked",
    "flagged": "Flagged",
    "classes": "Answers per class",
    "distances": "Distances",
    "shape": "Their histogram",
    "w": "W",
    "alarm": "PRADA",
}


def render(
    results: Sequence[TrialResult],
    *,
    name: str,
    description: str = "",
    storage: str | Path | None = None,
    folder: Path | None = None,
    search: SearchConfig | None = None,
    command: str = "",
    prices: PricesConfig | None = None,
    sweep: Sequence[TrialResult] | None = None,
    judged: evidence.JudgedSweep | None = None,
) -> str:
    """Return the report as HTML.

    Args:
        results: At least one trial.
        name: Name of the sweep or experiment.
        description: One paragraph for the reader.
        storage: Storage of the victims; None takes the one that the sweep was started with.
        folder: The sweep's folder, which records where its data and victims are.
        search: The search of the sweep, if there is one.
        command: The command that produced the results, if known.
        prices: Prices of an hour and of a query, if known.
        sweep: All trials of the sweep, if ``results`` are some of them: verdicts are corrected for all.
        judged: The judgements on them, if already made.
    """
    import jinja2

    all_judged = evidence.JudgedSweep.of(sweep or results) if judged is None else judged
    rungs = all_judged.rungs
    many = tables.is_many(results)
    values = _head(results, rungs, search, command) | {
        "name": name,
        "description": description,
        "spent": spending.sentence(results, prices),
        "part_of": len(sweep) if sweep is not None and len(sweep) > len(results) else 0,
        "many": many,
        "folder": folder.name if folder is not None else "FOLDER",
    }
    results = tables.with_short_points(results)
    values |= _below(results, all_judged.removals, storage, folder)
    values |= many_points.values(results, rungs, rung_table.lines(results, rungs)) if many else _each(results, rungs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mea_ray.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(values)


def _head(
    results: Sequence[TrialResult], judged: tables.Judgements, search: SearchConfig | None, command: str
) -> dict[str, Any]:
    """Return the values for the first screen, and for the list of settings at the end."""
    from markupsafe import Markup

    short = tables.with_short_points(results)
    best = searches.outcome(search, short) if search is not None else None
    changed = [(Markup("<code>%s</code>") % item.path, item.value, item.default) for item in settings.changed(short)]
    varied = [(Markup("<code>%s</code>") % item.path, item.value, item.default) for item in settings.varied(results)]
    return {
        "made": made(results, command),
        "summaries": verdict.summaries(results, judged),
        "selection": selection.sentence(results),
        "found": best,
        "found_lines": plain(best.lines) if best is not None else [],
        "threshold": tables.percent(verdict.threshold(results), 0),
        "significance": f"{verdict.significance(results):g}",
        "setting_headings": ("Config path", "Values", "Default"),
        "changed": plain(changed, text={1, 2}),
        "varied": plain(varied, text={1, 2}),
        "machines": settings.machines(results),
        "provenance": settings.provenance(results),
        "command": command,
        "trials": len(results),
        "queries": sum(result.queries_charged for result in results),
        "seconds": sum(result.seconds for result in results),
        "css": Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),  # ours, not the user's
    }


def made(results: Sequence[TrialResult], command: str) -> str:
    """Return when the results were produced, with which command and which commit; unknown parts are omitted."""
    days = sorted({result.date[:10] for result in results if result.date})
    commits = tables.listed(
        result.versions[name] for result in results for name in ("commit",) if name in result.versions
    )
    parts = [" to ".join(dict.fromkeys([days[0], days[-1]]))] if days else []
    parts += [command] if command else []
    parts += [f"commit {commits}"] if commits else []
    return " · ".join(parts)


def _each(results: Sequence[TrialResult], judged: tables.Judgements) -> dict[str, Any]:
    """Return the curve and the rows of each point."""
    return {
        "chosen_headings": selection.HEADINGS,
        "chosen": plain(line.cells for line in selection.chosen(results)),
        "figures": [_figure(chunk, position) for position, chunk in enumerate(_chunks(results))],
        "seeds": max(len(trials) for trials in tables.grouped(results).values()),
        "headings": list(tables.HEADINGS.values()),
        "rows": of_rows(
            tables.rows(results, judged), tables.HEADINGS, text={"verdict"}, toned="verdict", hint="trial {row.trial}"
        ),
        "means": of_rows(seeds.lines(results, judged), seeds.HEADINGS, text={"verdicts"}),
        "means_headings": list(seeds.HEADINGS.values()),
        "means_caption": seeds.CAPTION,
    }


def _below(
    results: Sequence[TrialResult],
    judged_removals: tables.Judgements,
    storage: str | Path | None,
    folder: Path | None,
) -> dict[str, Any]:
    """Return the tables and pictures after the results; for many points, with at most ``LINES`` rows each."""
    many = tables.is_many(results)
    most = LINES if many else 10**9
    first: dict[str, TrialResult] = {}
    for result in results:
        first.setdefault(result.victim, result)
    detected, leaned, paid = detections.lines(results), leakage.lines(results), tables.costs(results)
    return {
        "costs": [_cost(cost) for cost in paid[:most]],
        "costs_more": many_points.more(len(paid), most),
        "cost_headings": COST_HEADINGS,
        "statistic_headings": list(statistics.HEADINGS.values()),
        "statistics": of_rows(statistics.lines(results), statistics.HEADINGS, text={"statistic"}),
        "removal_headings": list(removals.HEADINGS.values()),
        "removals": of_rows(
            removals.lines(results, judged_removals),
            removals.HEADINGS,
            text={"removal", "on", "verdict"},
            toned="verdict",
        ),
        "planes": [] if many else removals.figures(results),
        "detection_headings": list(detections.HEADINGS.values()),
        "detections": of_rows(detected[:most], detections.HEADINGS, text=set(detections.HEADINGS) - {"point"}),
        "detections_more": many_points.more(len(detected), most),
        "front": None if many else front.figure(results),
        "front_headings": list(front.HEADINGS.values()),
        "front_lines": [] if many else of_rows(front.lines(results), front.HEADINGS, text={"thief"}),
        "front_caption": front.CAPTION,
        "leaning_headings": list(leakage.HEADINGS.values()),
        "leaning": of_rows(leaned[:most], leakage.HEADINGS, text={"named"}, toned="rank"),
        "leaning_caption": leakage.CAPTION,
        "leaning_more": many_points.more(len(leaned), most),
        "triggers": [] if many else detections.pictures(results),
        "attacks": attacks.pictures(results),
        "seen": _seen(results),
        "seen_headings": list(SEEN_HEADINGS.values()),
        "clients": attacks.clients(results),
        "galleries": [samples.gallery(result, storage, folder) for result in list(first.values())[:GALLERIES]],
        "victims": len(first),
    }


def _seen(results: Sequence[TrialResult]) -> list[Line]:
    lines = []
    for row in attacks.client_rows(results):
        cells = [Cell(getattr(row, name)) for name in SEEN_HEADINGS]
        cells[-1] = Cell(row.alarm, "bad" if row.alarmed else "")
        lines.append(Line(tuple(cells), f"client {row.client}"))
    return lines


def _cost(cost: tables.Cost) -> Line:
    """Return a victim's row: its number, and that of innocent models in parentheses."""
    from markupsafe import Markup

    error, innocent = (
        tables.DASH if value is None else f"{value:.3f}" for value in (cost.calibration, cost.null_calibration)
    )
    sources = [
        f"{name} {tables.percent(own)} ({tables.percent(null)})" for name, (own, null) in cost.source_accuracy.items()
    ]
    texts = (
        Markup("<code>%s</code> %s") % (cost.victim, cost.point),
        f"{tables.percent(cost.accuracy)} ({tables.percent(cost.null_accuracy)})",
        tables.DASH if cost.points is None else f"{cost.points:+.1f} points",
        error if innocent == tables.DASH else f"{error} ({innocent})",
        f"{tables.percent(cost.target_probability)} ({tables.percent(cost.null_target_probability)})",
        Markup("<br>").join(sources) or tables.DASH,
    )
    return Line(tuple(map(Cell, texts)))


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


def write(
    folder: Path,
    *,
    storage: str | Path | None = None,
    png: Path | None = None,
    prices: PricesConfig | None = None,
    only: Sequence[str] = (),
    everything: Sequence[TrialResult] | None = None,
    judged: evidence.JudgedSweep | None = None,
) -> Path:
    """Render ``report.html`` into a sweep's folder from its ``results/*.json``; for many points with a CSV beside it.

    Args:
        folder: The sweep's folder; ``sweep.yaml`` in it, if there, gives name, description and prices.
        storage: Storage of the victims; None takes the one that the sweep was started with.
        png: Also write the curves to this PNG file.
        prices: Prices of an hour and of a query; None takes those of ``sweep.yaml``.
        everything: The folder's results, if already read.
        judged: The judgements on them, if already made.
        only: Selects the trials of the page, see ``some``; the page is then named after the first trial.

    Returns:
        Path of the report.

    Raises:
        ArtifactError: There are no results, or one of them is damaged.
        ConfigError: ``only`` selects no trial.
    """
    everything = read_results(folder) if everything is None else everything
    results = some(everything, only) if only else everything
    about = _about(folder)
    judged = evidence.JudgedSweep.of(everything) if judged is None else judged
    text = render(
        results,
        name=str(about.get("name") or folder.resolve().name),
        description=str(about.get("description") or ""),
        storage=storage,
        folder=folder,
        search=None if only else searches.search_of(folder),
        command=command_of(folder),
        prices=prices or prices_of(folder),
        sweep=everything,
        judged=judged,
    )
    path = folder / (f"report-{results[0].trial}.html" if only else "report.html")
    write_whole(path, text)
    if tables.is_many(results):
        table = rung_table.lines(results, judged.rungs)
        write_whole(path.with_name(CSV), rung_table.as_csv(table))
    if png is not None:
        curves.png(_chunks(tables.with_short_points(results))[0], png)
    return path


def some(results: Sequence[TrialResult], only: Sequence[str]) -> list[TrialResult]:
    """Return some of a sweep's trials.

    Args:
        results: All of them.
        only: Each is the start of a trial's name, or ``path=value`` of its point, where the path can be shortened to
            its end. Selected are trials with one of the names, if any is given, and with all of the values.

    Raises:
        ConfigError: There is no such trial.
    """
    names = [text for text in only if "=" not in text]
    wanted = [text.partition("=")[::2] for text in only if "=" in text]

    def fits(result: TrialResult) -> bool:
        at = {path.removesuffix(".name"): setting(value) for path, value in result.point.items()}
        return all(
            any(f".{path}".endswith(f".{end.removesuffix('.name')}") and value == text for path, value in at.items())
            for end, text in wanted
        )

    selected = [
        each for each in results if (not names or any(each.trial.startswith(name) for name in names)) and fits(each)
    ]
    if not selected:
        paths = ", ".join(dict.fromkeys(path for result in results for path in result.point)) or "none"
        raise ConfigError(
            f"no trial of {len(results):,} matches --only {' '.join(only)}; give the start of a trial's name (as in "
            "the "
            f"column trial of `mea-ray report FOLDER --csv`), or path=value of these: {paths}"
        )
    return selected


def prices_of(folder: Path) -> PricesConfig | None:
    """Return the prices in ``sweep.yaml`` of a sweep's folder; None without any."""
    prices = _about(folder).get("prices")
    return build(PricesConfig, prices) if prices else None


def _about(folder: Path) -> dict[str, Any]:
    from mea_ray.config import load_tree

    try:
        return load_tree(folder / "sweep.yaml")
    except ConfigError:  # results that were copied without their sweep can still be reported
        return {}
