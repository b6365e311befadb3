"""A calibration on the terminal, as a picture and as a record: models that would be accused, and a forger's success."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ArtifactError
from mea_ray.core.versions import command_line
from mea_ray.report import curves
from mea_ray.report.markdown import table
from mea_ray.report.record import RECORD, SweepRecord, check_target
from mea_ray.report.tables import percent
from mea_ray.report.terminal import make_console
from mea_ray.results.portable import anonymous, portable
from mea_ray.results.records import ModelReport, read_record
from mea_ray.storage.files import refusing, try_writing, write_whole
from mea_ray.training.device import device_name
from mea_ray.verification.verdict import SEVERITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mea_ray.calibration.measured import MeasuredModel
    from mea_ray.calibration.run import Calibration, Numbers
    from mea_ray.calibration.thresholds import Threshold
    from mea_ray.calibration.verdicts import VerdictCounts

NAMES = {
    "paper": "the configured one",
    "largest": "largest innocent model's",
    "normal": "normal fitted to innocent ones",
}
"""Maps the source of a threshold to its display text."""
CALIBRATION = "calibration.json"
CALIBRATION_PARTS = ("statistics", "verdicts")
"""Tables of a recorded calibration."""
STATISTIC_HEADINGS = (
    "Queries",
    "Statistic",
    "Innocent comparisons",
    "Stolen models",
    "Recognised at no false accusation",
    "at 1%",
    "AUC",
)
VERDICT_HEADINGS = ("Queries", "Statistic", 'Innocent, "proved"', 'Stolen, "proved"', "Other verdicts on stolen models")


def run(
    config: ExperimentConfig, numbers: Numbers, address: str | None, record: Path | None = None, note: str = ""
) -> None:
    """Calibrate with progress, then show the tables and the paths of the output.

    Args:
        config: The experiment.
        numbers: How many models.
        address: See ``calibrate``.
        record: Folder of the record; None makes no record.
        note: A note for readers of the record.
    """
    from mea_ray.calibration.run import FILE, calibrate

    if record is not None:
        with refusing(f"{record} cannot be written", "give another folder with --record"):
            check_target(record)
            try_writing(record)
    progress = make_console(stderr=True)

    def show_step(text: str, done: int, of: int) -> None:
        progress.print(f"{done:>4} of {of}  {text}", soft_wrap=True)

    calibration, folder = calibrate(config, numbers, address=address, on_step=show_step)
    console = make_console()
    show(console, calibration)
    picture = folder / "calibration.png"
    draw(calibration, picture)
    console.print(f"\ncalibration  {folder / FILE}", soft_wrap=True)
    console.print(f"picture      {picture}", soft_wrap=True)
    if record is not None:
        put_on_record(calibration, record, note)
        console.print(f"record       {record}", soft_wrap=True)


def put_on_record(calibration: Calibration, target: Path, note: str = "") -> None:
    """Turn a calibration into a record that the documentation can be rendered from.

    Args:
        calibration: The calibration.
        target: Folder of the record, e.g. ``sweeps/results/calibration_digits``; an existing record is replaced.
        note: A note for readers, e.g. about the machine.

    Raises:
        ConfigError: ``target`` is a folder with other content than a record.
    """
    check_target(target)
    known = calibration.versions
    made = SweepRecord(
        command=portable(command_line()),
        commit=known.get("commit", "unknown"),
        date=datetime.now(timezone.utc).date().isoformat(),
        device=device_name(),
        versions={name: version for name, version in known.items() if name != "commit"},
        trials=calibration.marked,
        seconds=0.0,
        note=note,
    )
    slim = calibration.model_copy(
        update={
            "config": anonymous(calibration.config),
            "keys": [
                key.model_copy(update={"models": [_slim(each) for each in key.models]}) for key in calibration.keys
            ],
        }
    )
    write_whole(target / CALIBRATION, slim.model_dump_json(exclude_defaults=True) + "\n")
    write_whole(target / RECORD, made.model_dump_json(indent=1) + "\n")


def _slim(measured: MeasuredModel) -> MeasuredModel:
    """Return a measurement without data that no table of a calibration shows."""
    report = measured.report
    remaining = {"wsr": report.wsr, "statistics": report.statistics, "key_ranks": report.key_ranks}
    return measured.model_copy(
        update={"report": ModelReport(accuracy=report.accuracy, fidelity=report.fidelity, **remaining)}
    )


def show(console: Console, calibration: Calibration) -> None:
    """Print rates, statistics, verdicts and thresholds."""
    for rates, kind in ((calibration.innocent_rates, "Innocent"), (calibration.marked_rates, "Watermarked")):
        console.print(
            f"{kind} models: WSR {percent(float(np.mean(rates)))} on average, {percent(min(rates))} to "
            f"{percent(max(rates))} ({len(rates)} measurements)"
        )
    console.print(_rich("What tells stolen models from innocent ones", STATISTIC_HEADINGS, statistic_rows(calibration)))
    console.print(_rich("Verdicts, each suspect judged alone", VERDICT_HEADINGS, verdict_rows(calibration)))
    console.print(_table("Threshold on the WSR of a given key", calibration.thresholds))
    console.print(
        _table("Threshold that a forger does not reach, who may choose classes and geometry", calibration.forging)
    )


def statistic_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    """Return one row for each budget and statistic, the best statistic of a budget first; see STATISTIC_HEADINGS."""
    return [
        (
            f"{table.budget:,}",
            row.statistic,
            f"{row.innocent:,}",
            f"{row.stolen:,}",
            percent(row.tpr_at_0, 0),
            percent(row.tpr_at_1, 0),
            f"{row.auc:.3f}",
        )
        for table in calibration.statistics
        for row in table.rows
    ]


def verdict_rows(calibration: Calibration) -> list[tuple[str, ...]]:
    """Return one row for each budget and statistic; see VERDICT_HEADINGS."""
    return [
        (
            f"{counts.budget:,}",
            counts.statistic,
            f"{counts.false_proofs:,} of {counts.comparisons:,}",
            f"{counts.proofs:,} of {sum(counts.stolen.values()):,}",
            _others(counts),
        )
        for counts in calibration.verdicts
    ]


def _others(counts: VerdictCounts) -> str:
    """Return the other verdicts on stolen models, worst first."""
    known = [(verdict, counts.stolen[verdict]) for verdict in SEVERITY if counts.stolen.get(verdict)]
    return ", ".join(f"{verdict}: {number:,}" for verdict, number in known if verdict != "proved")


def render(folder: Path, part: str) -> str:
    """Render a table of a recorded calibration as Markdown.

    Args:
        folder: The record.
        part: One of ``CALIBRATION_PARTS``.

    Raises:
        ArtifactError: The record contains no readable calibration.
    """
    from mea_ray.calibration.run import Calibration

    path = folder / CALIBRATION
    calibration = read_record(Calibration, path)
    if calibration is None:
        raise ArtifactError(
            f"{path} is not a readable calibration; make it again with mea-ray calibrate --record {folder}"
        )
    headings, rows = {
        "statistics": (STATISTIC_HEADINGS, statistic_rows(calibration)),
        "verdicts": (VERDICT_HEADINGS, verdict_rows(calibration)),
    }[part]
    return table(headings, rows)


def _rich(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    made = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="left" if place == 1 else "right")
    for row in rows:
        made.add_row(*row)
    return made


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
    values = {
        "innocent: given key": calibration.innocent_rates,
        "innocent: best forgery": [each.best for each in calibration.forged],
        "watermarked: given key": calibration.marked_rates,
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
    innocent = [each.rates for each in calibration.forged]
    cube = np.array([[[np.nan if v is None else v for v in row] for row in rates] for rates in innocent])
    known = ~np.isnan(cube)
    counts = known.sum(0)
    means = np.where(counts, np.where(known, cube, 0).sum(0) / np.maximum(counts, 1), np.nan)
    mesh = axes.imshow(100 * means, cmap="viridis", vmin=0, vmax=100)
    names = calibration.class_names
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title("What a forger gets of innocent models (%)", loc="left", fontsize=11, color=curves.INK)
    axes.figure.colorbar(mesh, ax=axes, shrink=0.8)
