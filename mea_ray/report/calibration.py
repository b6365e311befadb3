"""A calibration on the terminal and as one picture: who would be accused, and what a forger gets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from mea_ray.config import ExperimentConfig
from mea_ray.report import curves
from mea_ray.report.tables import percent
from mea_ray.report.terminal import make_console

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mea_ray.calibration.run import Calibrated, Calibration
    from mea_ray.calibration.separation import Separation
    from mea_ray.calibration.thresholds import Threshold

NAMES = {
    "paper": "the configured one",
    "largest": "largest innocent model's",
    "normal": "normal fitted to innocent ones",
}
"""Where a threshold comes from, to how it is called."""


def run(config: ExperimentConfig, models: int, address: str | None) -> None:
    """Calibrate with progress, then show the thresholds and say where everything is."""
    from mea_ray.calibration.run import calibrate

    progress = make_console(stderr=True)

    def show_progress(found: Calibrated, done: int, of: int) -> None:
        kind = "innocent" if found.role == "null" else "watermarked"
        progress.print(f"{done:>4} of {of}  {kind} {found.index}: WSR {percent(found.wsr)}", soft_wrap=True)

    calibration, folder = calibrate(config, models, address=address, on_model=show_progress)
    console = make_console()
    show(console, calibration)
    picture = folder / "calibration.png"
    draw(calibration, picture)
    console.print(f"\ncalibration  {folder / 'calibration.json'}", soft_wrap=True)
    console.print(f"picture      {picture}", soft_wrap=True)


def show(console: Console, calibration: Calibration) -> None:
    """Print rates and thresholds."""
    for role, kind in (("null", "Innocent"), ("victim", "Watermarked")):
        rates = calibration.rates(role)  # type: ignore[arg-type]
        console.print(
            f"{kind} models: WSR {percent(float(np.mean(rates)))} on average, {percent(min(rates))} to "
            f"{percent(max(rates))} ({len(rates)} models)"
        )
    console.print(_statistics(calibration.statistics))
    console.print(_table("Threshold on the WSR of a given key", calibration.thresholds))
    console.print(
        _table("Threshold that a forger does not reach, who may choose classes and geometry", calibration.forging)
    )


def _statistics(rows: list[Separation]) -> RichTable:
    table = RichTable(
        title="How well each statistic separates watermarked from innocent models",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("Statistic", "Recognised at no false accusation", "at 1%", "AUC"):
        table.add_column(heading, justify="left" if heading == "Statistic" else "right")
    for row in rows:
        table.add_row(row.statistic, percent(row.tpr_at_0, 0), percent(row.tpr_at_1, 0), f"{row.auc:.3f}")
    return table


def _table(title: str, rows: list[Threshold]) -> RichTable:
    table = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("Threshold", "WSR above", "Innocent models accused", "at most (95%)", "Watermarked recognised"):
        table.add_column(heading, justify="left" if heading == "Threshold" else "right")
    for row in rows:
        table.add_row(
            NAMES[row.name],
            percent(row.value),
            f"{row.accused} of {row.innocent}",
            percent(row.accusation_high),
            percent(row.recognised),
        )
    return table


def draw(calibration: Calibration, path: Path) -> None:
    """Write the distributions (the paper's figure 8) and the forger's heat map (figure 7) as one PNG."""
    figure = curves.new_figure((10.0, 4.2))
    left, right = figure.subplots(1, 2)
    _distributions(left, calibration)
    _heat_map(right, calibration)
    figure.savefig(path, format="png", dpi=110, facecolor="white", metadata={"Software": None})


def _distributions(axes: Axes, calibration: Calibration) -> None:
    innocent = [model for model in calibration.models if model.role == "null"]
    values = {
        "innocent: given key": [model.wsr for model in innocent],
        "innocent: best forgery": [model.best_forgery for model in innocent],
        "watermarked: given key": calibration.rates("victim"),
    }
    bins = [float(edge) for edge in np.linspace(0, 100, 41)]
    for colour, (name, rates) in zip(curves.COLOURS, values.items(), strict=False):
        axes.hist([100 * rate for rate in rates], bins=bins, alpha=0.6, color=colour, label=name)
    paper = next(row.value for row in calibration.thresholds if row.name == "paper")
    axes.axvline(100 * paper, color=curves.MUTED, linestyle=(0, (6, 3)))
    axes.set_xlabel("rate (%)", color=curves.MUTED, fontsize=9)
    axes.set_ylabel("models", color=curves.MUTED, fontsize=9)
    axes.set_title("WSR of given keys, and of forged ones", loc="left", fontsize=11, color=curves.INK)
    axes.legend(frameon=False, fontsize=8)
    curves.plain(axes)


def _heat_map(axes: Axes, calibration: Calibration) -> None:
    innocent = [model.forged for model in calibration.models if model.role == "null"]
    cube = np.array([[[np.nan if v is None else v for v in row] for row in forged] for forged in innocent])
    known = ~np.isnan(cube)
    counts = known.sum(0)
    means = np.where(counts, np.where(known, cube, 0).sum(0) / np.maximum(counts, 1), np.nan)
    shown = axes.imshow(100 * means, cmap="viridis", vmin=0, vmax=100)
    names = calibration.class_names
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title("What a forger gets of innocent models (%)", loc="left", fontsize=11, color=curves.INK)
    axes.figure.colorbar(shown, ax=axes, shrink=0.8)
