"""The results of a sweep as Markdown, for ``mea-ray report --markdown`` and for the documentation's tables."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_ray.config import load_tree
from mea_ray.core.errors import ConfigError
from mea_ray.report import published, selection, verdict
from mea_ray.report.detections import HEADINGS as DETECTION_HEADINGS
from mea_ray.report.detections import lines as detection_rows
from mea_ray.report.front import HEADINGS as FRONT_HEADINGS
from mea_ray.report.front import lines as front_rows
from mea_ray.report.leakage import HEADINGS as LEANING_HEADINGS
from mea_ray.report.leakage import lines as leaning_rows
from mea_ray.report.record import RECORD, SWEEP, SweepRecord
from mea_ray.report.removals import ON, losses
from mea_ray.report.seeds import counted
from mea_ray.report.statistics import HEADINGS as STATISTIC_HEADINGS
from mea_ray.report.statistics import lines as statistic_rows
from mea_ray.report.tables import MARKS, grouped, mean, percent, with_short_points
from mea_ray.results.points import is_seed, setting, short_name, short_paths
from mea_ray.results.records import RESULTS, ModelReport, RungResult, TrialResult, read_results
from mea_ray.verification.evidence import accused, judge_rungs

SEEDS_LISTED = 5
"""Maximum number of seeds for which the WSR of each is shown after the mean."""
OWNER = {"data", "splits", "victim"}
"""Sections of the config that determine the victim."""


def results_table(sweep: str, results: Sequence[TrialResult], budgets: Container[int] | None = None) -> str:
    """Return one row for each kind of model: victim, innocent model, substitutes by budget, stolen innocent model.

    Args:
        sweep: Name of the sweep; the papers' figures are looked up by it.
        results: Its trials. Those that differ only in seeds are averaged.
        budgets: Budgets whose stolen models get a row; None for all. Verdicts are corrected for all budgets.
    """
    groups = grouped(results)
    short = short_paths(list(dict.fromkeys(path for result in results for path in result.point)))
    judged = judge_rungs(results)
    rows: list[Row] = []
    printed: set[tuple[str, ...]] = set()
    for name, trials in groups.items():
        owners = tuple(dict.fromkeys(trial.victim for trial in trials))
        if owners not in printed:
            printed.add(owners)
            rows += _owner_rows(sweep, trials, short)
        who = "substitute" if name == "all trials" else f"substitute, {_named(trials[0].point, short)}"
        for budget in sorted({rung.budget for trial in trials for rung in trial.rungs}):
            if budgets is not None and budget not in budgets:
                continue
            rungs = [rung for trial in trials for rung in trial.rungs if rung.budget == budget]
            paper = published.find(sweep, "substitute", trials[0].config, queries=budget)
            places = [(trial.trial, budget) for trial in trials]
            verdicts = counted([judged[place] for place in places if place in judged])
            rows.append(_rung_row(who, rungs, verdicts, paper))
        stolen = [(trial, rung) for trial in trials for rung in trial.stolen_nulls]
        stolen = [(trial, rung) for trial, rung in stolen if budgets is None or rung.budget in budgets]
        if stolen:
            accusations = sum(accused(trial, rung.report) for trial, rung in stolen)
            innocent = f"innocent model stolen{who.removeprefix('substitute')}"
            text = f"{accusations} of {len(stolen)} accused"
            rows.append(_rung_row(innocent, [rung for _, rung in stolen], text, None))
    return _with_papers(("Model", "Queries", "Accuracy", "Fidelity", "WSR", "WFPR", "Verdict"), rows)


def largest_table(sweep: str, results: Sequence[TrialResult]) -> str:
    """Return the table of results with only the largest budget."""
    return results_table(sweep, results, [max(rung.budget for result in results for rung in result.rungs)])


def _choices(point: Mapping[str, Any]) -> str:
    """Return the components of a trial, e.g. ``mea_carrier, unlean``; empty if these do not identify it."""
    chosen = {path.removesuffix(".name"): value for path, value in point.items() if not is_seed(path)}
    words = [path.rpartition(".")[2] for path in chosen]
    if len(set(words)) < len(words) or not all(isinstance(value, (str, Mapping)) for value in chosen.values()):
        return ""
    return ", ".join(map(setting, chosen.values()))


Row = tuple[tuple[str, ...], published.Published | None]
"""Cells of a row of a table, and the paper's figures for it."""


def _named(point: Mapping[str, Any], short: Mapping[str, str]) -> str:
    return _choices(point) or short_name(point, short)


def _owner_rows(sweep: str, trials: Sequence[TrialResult], short: Mapping[str, str]) -> list[Row]:
    own = {path: value for path, value in trials[0].point.items() if path.split(".")[0] in OWNER}
    of = f", {_named(own, short)}" if any(not is_seed(path) for path in own) else ""
    first = {trial.victim: trial for trial in trials}.values()
    victims = [trial.victim_report for trial in first]
    nulls = [report for trial in first for report in trial.null_reports]
    rows: list[Row] = [
        (_cells(f"victim{of}", "", victims), published.find(sweep, "victim", trials[0].config)),
    ]
    if nulls:
        rows.append((_cells(f"innocent model{of}", "", nulls), None))
    return rows


def _rung_row(who: str, rungs: Sequence[RungResult], verdict: str, paper: published.Published | None) -> Row:
    numbers = {rung.queries for rung in rungs}
    queries = " to ".join(f"{n:,}" for n in sorted({min(numbers), max(numbers)}))
    return _cells(who, queries, [rung.report for rung in rungs], verdict), paper


def _cells(who: str, queries: str, reports: Sequence[ModelReport], verdict: str = "") -> tuple[str, ...]:
    return (
        who,
        queries,
        percent(mean([report.accuracy for report in reports])),
        percent(mean([report.fidelity for report in reports])),
        _each([report.wsr.rate if report.wsr else None for report in reports]),
        percent(mean([report.wfpr_mean for report in reports])),
        verdict,
    )


def _each(values: Sequence[float | None]) -> str:
    """Return the mean and, for few seeds, the value of each."""
    known = [value for value in values if value is not None]
    text = percent(mean(known))
    if 2 <= len(known) <= SEEDS_LISTED:
        text += f" ({', '.join(f'{100 * value:.1f}' for value in known)})"
    return text


def removals_table(sweep: str, results: Sequence[TrialResult]) -> str:
    """Return one row for each removal: accuracy and WSR of every model after it."""
    rows: list[Row] = []
    groups = grouped(results)
    for name, trials in groups.items():
        tried = losses(trials)
        on = [kind for kind in ON if any(loss.on == kind for loss in tried)]
        for removal in dict.fromkeys(loss.removal for loss in tried):
            cells = [removal if len(groups) == 1 else f"{name}: {removal}"]
            for kind in on:
                after = [r.after for loss in tried if (loss.removal, loss.on) == (removal, kind) for r in loss.results]
                cells.append(_pair(after))
            settings = next(loss.results[0].removal for loss in tried if loss.removal == removal)
            paper = published.find(sweep, "after removal", trials[0].config, removal=settings, tried_on="substitute")
            rows.append((tuple(cells), paper))
    if not rows:
        return "No removal was tried."
    headings = ("Removal", *(f"{ON[kind]}: accuracy, WSR" for kind in ON if kind in _tried(results)))
    return _with_papers(headings, rows)


def _tried(results: Sequence[TrialResult]) -> set[str]:
    return {removal.tried_on for result in results for removal in result.removals}


def _pair(reports: Sequence[ModelReport]) -> str:
    if not reports:
        return ""
    wsr = mean([report.wsr.rate if report.wsr else None for report in reports])
    return f"{percent(mean([report.accuracy for report in reports]))}, {percent(wsr)}"


def detections_table(_: str, results: Sequence[TrialResult]) -> str:
    """Return one row for each detection, inspected model and trial."""
    rows = [tuple(getattr(row, column) for column in DETECTION_HEADINGS) for row in detection_rows(results)]
    return table(tuple(DETECTION_HEADINGS.values()), rows) if rows else "No detection was tried."


def statistics_table(_: str, results: Sequence[TrialResult]) -> str:
    """Return how well each statistic separates stolen from innocent models, for each budget."""
    rows = [tuple(getattr(row, column) for column in STATISTIC_HEADINGS) for row in statistic_rows(results)]
    return table(tuple(STATISTIC_HEADINGS.values()), rows) if rows else "Too few innocent models were measured."


def leaning_table(_: str, results: Sequence[TrialResult]) -> str:
    """Return what the answers give away, for each victim and number of answers."""
    rows = [tuple(getattr(row, column) for column in LEANING_HEADINGS) for row in leaning_rows(results)]
    return table(tuple(LEANING_HEADINGS.values()), rows) if rows else "It was not measured what the answers give away."


def front_table(_: str, results: Sequence[TrialResult]) -> str:
    """Return cost, leakage and proof of each mark, for each budget."""
    rows = [tuple(getattr(row, column) for column in FRONT_HEADINGS) for row in front_rows(results)]
    return table(tuple(FRONT_HEADINGS.values()), rows) if rows else "The sweep compares no marks."


def chosen_table(_: str, results: Sequence[TrialResult]) -> str:
    """Return the chosen setting of each component, and how it was chosen."""
    rows = [each.cells for each in selection.chosen(results)]
    if not rows:
        return "The sweep chooses no settings."
    return f"{table(selection.HEADINGS, rows)}\n\n{selection.sentence(results)}"


def verdict_list(_: str, results: Sequence[TrialResult]) -> str:
    """Return the first screen of the report: for each scheme the headline and the findings."""
    how = selection.sentence(results)
    parts = [] if how is None else [how]
    for summary in verdict.summaries(results):
        scheme = f"`{summary.scheme}`: " if summary.scheme else ""
        items = "\n".join(f"- {MARKS[finding.tone]} {finding.text}" for finding in summary.findings)
        parts.append(f"**{scheme}{summary.headline.text}**\n\n{items}")
    return "\n\n".join(parts)


TABLES: Mapping[str, Callable[[str, Sequence[TrialResult]], str]] = {
    "results": results_table,
    "largest": largest_table,
    "removals": removals_table,
    "detections": detections_table,
    "statistics": statistics_table,
    "front": front_table,
    "leaning": leaning_table,
    "chosen": chosen_table,
    "verdict": verdict_list,
}
"""Renderers of tables by name, called with the sweep's name and its trials."""


def provenance(folder: Path) -> str:
    """Return how a record was made, in one paragraph, with the command in a code block."""
    record = SweepRecord.load(folder)
    note = f"{record.note[0].upper()}{record.note[1:].rstrip('.')}. " if record.note else ""
    packages = ", ".join(f"{name} {record.versions[name]}" for name in ("torch", "ray") if name in record.versions)
    trials = f"; {record.trials} trials" if (folder / RESULTS).is_dir() else ""
    return (
        f"{note}Commit `{record.commit}`, {record.date}, device `{record.device}`, Python "
        f"{record.versions.get('python', 'unknown')}, {packages}{trials}.\n\n"
        f"<!-- run: check -->\n```console\n$ {record.command}\n```"
    )


def report(folder: Path) -> str:
    """Return all tables of a sweep's folder or a record as Markdown.

    Raises:
        ArtifactError: The folder cannot be read or contains no result, or a result is not usable.
    """
    results = with_short_points(read_results(folder))
    name = sweep_name(folder)
    parts = [f"## {name}"]
    if (folder / RECORD).exists():
        parts.append(provenance(folder))
    parts.append(results_table(name, results))
    if statistic_rows(results):
        parts.append(statistics_table(name, results))
    if any(result.removals for result in results):
        parts.append(removals_table(name, results))
    if any(result.detections for result in results):
        parts.append(detections_table(name, results))
    if front_rows(results):
        parts.append(front_table(name, results))
    if leaning_rows(results):
        parts.append(leaning_table(name, results))
    if picked := selection.chosen(results):
        parts.append(table(selection.HEADINGS, [line.cells for line in picked]))
    parts.append(verdict_list(name, results))
    return "\n\n".join(parts) + "\n"


def sweep_name(folder: Path) -> str:
    """Return the name of the sweep in a folder; the folder's name if it has no sweep file."""
    try:
        return str(load_tree(folder / SWEEP).get("name") or folder.resolve().name)
    except ConfigError:  # results that were copied without their sweep file
        return folder.resolve().name


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right.

    Class names come from the data's author and are escaped: a line break does not end the row, and tags are not HTML.
    """
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _with_papers(headings: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table, with a column of the papers' figures and their sources below it where there are any."""
    sources = list(dict.fromkeys(paper.source for _, paper in rows if paper is not None))
    if not sources:
        return table(headings, [cells for cells, _ in rows])
    rows_with_paper = [(*cells, paper.text() if paper is not None else "") for cells, paper in rows]
    return f"{table((*headings, 'Paper'), rows_with_paper)}\n\nPaper: {'; '.join(sources)}."
