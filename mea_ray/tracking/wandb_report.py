"""A W&B report of a sweep: its curves, parallel coordinates and importances, over the sweep's own runs.

It needs the package `wandb-workspaces`_ (``pip install 'mea_ray[wandb-report]'``), which writes reports through the API
of the server that ``wandb login`` chose. Its interface is a public preview of W&B.

.. _wandb-workspaces: https://docs.wandb.ai/ref/wandb_workspaces
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mea_ray.core.errors import ConfigError, TrackingUnavailable
from mea_ray.results.points import is_seed, setting, short_paths
from mea_ray.storage.files import write_whole
from mea_ray.tracking.rows import flatten

KNOWN = "report.json"
"""File below ``<sweep>/wandb`` with the id of the report, so that the same one is updated."""
CURVES = {
    "Watermark success rate": ("wsr", "threshold", "null_high"),
    "Accuracy of the substitutes": ("accuracy",),
    "Fidelity to the victim": ("fidelity",),
}
MEASURED = ("wsr", "accuracy", "victim_gap")
"""Numbers of each run's summary that close the parallel coordinates."""
MOST_SETTINGS = 8


def varied(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the paths below ``set`` in the runs' configs that have more than one value, without seeds."""
    values: dict[str, set[str]] = {}
    for point in points:
        for path, value in flatten(point).items():
            if not is_seed(path):
                values.setdefault(path, set()).add(setting(value))
    return [path for path, seen in values.items() if len(seen) > 1]


def save_report(
    folder: Path,
    points: Iterable[Mapping[str, Any]],
    *,
    sweep: str,
    project: str,
    entity: str | None = None,
    description: str = "",
    command: str = "",
) -> str:
    """Save the report of a sweep on the W&B server, or update the one that was saved before.

    Args:
        folder: The sweep's folder.
        points: What the sweep set in each trial.
        sweep: Its name, which its runs have as a tag.
        project: W&B project of its runs.
        entity: W&B entity; None for the account's default.
        description: One paragraph for the reader.
        command: The command line of the sweep, if it is known.

    Returns:
        The report's address.

    Raises:
        ConfigError: The package is missing.
        TrackingUnavailable: The server cannot be reached, or refuses the report.
    """
    try:
        wr: Any = importlib.import_module("wandb_workspaces.reports.v2")  # its types export no names
    except ImportError as error:
        raise ConfigError(
            f"a W&B report needs the package wandb-workspaces ({error}); pip install 'mea_ray[wandb-report]'"
        ) from error
    try:
        report = wr.Report(
            project=project, title=sweep, description=description, **({"entity": entity} if entity else {})
        )
        known = _known(folder, report.entity, project)
        report.id = known or report.id
        runs = wr.Runset(
            name="trials",
            entity=report.entity,
            project=project,
            filters=f"Tags() in [{json.dumps(sweep[:64])}] and Metric('JobType') = 'trial'",
        )
        report.blocks = [
            *([wr.P(description)] if description else []),
            *([wr.MarkdownBlock(text=f"```\n{command}\n```")] if command else []),
            wr.PanelGrid(runsets=[runs], panels=_panels(wr, varied(points))),
        ]
        report.save()
        address = str(report.url)
    except Exception as error:  # W&B raises errors of many packages; all mean that there is no report
        reason = " ".join(str(error).split())[:300]
        raise TrackingUnavailable(
            f"the W&B report of {sweep!r} was not saved ({type(error).__name__}: {reason}); check `wandb login`, and "
            f"that the runs of the sweep were sent to the project {project!r}"
        ) from error
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    write_whole(
        folder / "wandb" / KNOWN, json.dumps({"id": report.id, "entity": report.entity, "project": project}, indent=1)
    )
    return address


def _known(folder: Path, entity: str, project: str) -> str | None:
    """Return the id of the report that an earlier call saved in the same project."""
    try:
        known = json.loads((folder / "wandb" / KNOWN).read_text(encoding="utf-8"))
        return str(known["id"]) if (known["entity"], known["project"]) == (entity, project) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _panels(wr: Any, paths: list[str]) -> list[Any]:
    """Return the panels of the report.

    Args:
        wr: ``wandb_workspaces.reports.v2``.
        paths: Settings that vary.
    """
    panels: list[Any] = [
        wr.LinePlot(title=title, x="queries", y=list(names), layout=_place(wr, number))
        for number, (title, names) in enumerate(CURVES.items())
    ]
    number = len(panels)
    panels.append(
        wr.ScatterPlot(
            title="Proof against cost to customers",
            x=wr.SummaryMetric("victim_gap"),
            y=wr.SummaryMetric("wsr"),
            layout=_place(wr, number),
        )
    )
    if not paths:
        return panels
    short = short_paths(paths)
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=wr.Config(f"set.{path}"), display_name=short[path])
        for path in paths[:MOST_SETTINGS]
    ]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in MEASURED]
    panels.append(wr.ParallelCoordinatesPlot(columns=columns, layout=wr.Layout(x=0, y=16, w=24, h=10)))
    panels.append(wr.ParameterImportancePlot(with_respect_to="wsr", layout=wr.Layout(x=0, y=26, w=24, h=8)))
    return panels


def _place(wr: Any, number: int) -> Any:
    """Return the place of a panel, two in a line of 24 columns."""
    return wr.Layout(x=12 * (number % 2), y=8 * (number // 2), w=12, h=8)
