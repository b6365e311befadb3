"""What the commands do once their arguments are parsed."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from mea_ray.cli.sweeps import find
from mea_ray.cli.sync import attach_report
from mea_ray.config import (
    ExperimentConfig,
    PricesConfig,
    SweepConfig,
    build,
    load_base,
    load_experiment,
    load_sweep,
    load_tree,
)
from mea_ray.config.loading import dropped_options
from mea_ray.config.overrides import overridden, split_override
from mea_ray.core.errors import ConfigError
from mea_ray.report import tables
from mea_ray.report.search import search_of
from mea_ray.report.terminal import make_console, note, pairs_table, print_results
from mea_ray.results.records import RESULTS, TrialResult, read_results
from mea_ray.storage.files import refusing
from mea_ray.storage.remote import Storage
from mea_ray.sweep.event_log import EVENTS
from mea_ray.verification.evidence import JudgedSweep


def read_experiment(file: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """Read an experiment.

    Raises:
        ConfigError: It is not a valid experiment; the message says so if it is a sweep.
    """
    file = find(file)
    if {"base", "space"} & set(load_tree(file)):
        raise ConfigError(f"{file} is a sweep, not one experiment; start it with: mea-ray sweep {file}")
    config = load_experiment(file, overrides)
    _note_dropped(dropped_options(ExperimentConfig, load_tree(file), overrides))
    return config


def read_sweep(file: Path, overrides: Sequence[str]) -> SweepConfig:
    """Read a sweep.

    Raises:
        ConfigError: It is not a valid sweep; the message says so if it is a single experiment.
    """
    file = find(file)
    keys = set(load_tree(file))
    if keys and not keys & set(SweepConfig.model_fields) and keys & set(ExperimentConfig.model_fields):
        raise ConfigError(f"{file} is one experiment, not a sweep; start it with: mea-ray run {file}")
    config = load_sweep(file, overrides)
    _note_dropped_of_base(file, overrides)
    return config


def _note_dropped_of_base(file: Path, overrides: Sequence[str]) -> None:
    _note_dropped(dropped_options(ExperimentConfig, load_tree(file).get("base") or {}, overrides))


def _note_dropped(lost: Sequence[str]) -> None:
    """Print on stderr which options of the file an override of a component's name dropped."""
    if lost:
        note(
            f"another component has other options, so the file's {', '.join(lost)} is dropped; repeat it on the "
            "command line to keep it"
        )


def read_base(file: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """Read an experiment, or the base of a sweep.

    Raises:
        ConfigError: It is neither.
    """
    file = find(file)
    if {"base", "space"} & set(load_tree(file)):
        base = load_base(file, overrides)
        _note_dropped_of_base(file, overrides)
        return base
    return read_experiment(file, overrides)


def sweep_of_one(config: ExperimentConfig, name: str) -> SweepConfig:
    """Return the sweep whose only trial is ``config``."""
    return build(SweepConfig, {"name": name, "base": config.resolved()})


def check_address(address: str | None) -> None:
    """Reject an address that Ray could not use, before anything is read or imported.

    Raises:
        ConfigError: It cannot be used, see `address.check`.
    """
    from mea_ray.sweep.address import check

    check(address)


def run_sweep(config: SweepConfig, resume: bool, address: str | None) -> bool:
    """Run a sweep with live progress, then show the results.

    Returns:
        Whether a trial failed.
    """
    from mea_ray import api
    from mea_ray.cli.progress import SweepProgress
    from mea_ray.sweep.space import points

    known = () if config.search.adaptive else points(config)
    with SweepProgress(make_console(stderr=True), points=known) as progress:
        outcome = api.run_sweep(config, resume=resume, address=address, on_event=progress)
    storage = config.base.storage
    location = f"{storage.rstrip('/')}/{config.name}" if "://" in storage else None
    return finish(make_console(), Path(outcome.folder), outcome.failed, location)


def run_local(config: ExperimentConfig, name: str) -> bool:
    """Run one experiment in this process, then show the results.

    Returns:
        Whether it failed: always False, since a failure raises.
    """
    from mea_ray.experiment.local import run_local as run

    Storage(config.storage).check_writable()
    name = sweep_of_one(config, name).name  # rejects a name that leads out of the folder
    console = make_console(stderr=True)
    with console.status("loading the data") as status:

        def on_epoch(role: str, model: str, epoch: Mapping[str, Any]) -> None:
            stage, number = epoch.get("stage", ""), epoch.get("epoch", "")
            what = f"training the {'null model' if role == 'null' else role}, stage {stage}"
            if epoch.get("resumed"):
                console.print(f"{what}: continuing after epoch {number} of {epoch.get('epochs', '')}")
            status.update(f"{what}: epoch {number}")

        done = run(config, name, on_epoch=on_epoch, warn=lambda text: console.print(escape(text), soft_wrap=True))
    if done.reused:
        console.print(f"This experiment has already finished; delete {done.folder} to run it again.", soft_wrap=True)
    return finish(make_console(), done.folder, {})


def finish(console: Console, folder: Path, failed: Mapping[str, str], location: str | None = None) -> bool:
    """Show the table of a sweep's folder, render its report, and say where everything is.

    Args:
        console: Where to.
        folder: The sweep's folder.
        failed: Failed trials, with the reason.
        location: URI of the sweep's folder, if it is remote.

    Returns:
        Whether any trial failed.
    """
    from mea_ray.report import html

    if any((folder / RESULTS).glob("*.json")):
        results = read_results(folder)
        judged = JudgedSweep.of(results)
        print_results(console, results, search_of(folder), prices=html.prices_of(folder), judged=judged)
        page = html.write(folder, everything=results, judged=judged)
        console.print(f"\nresults  {folder / RESULTS}", soft_wrap=True)
        if (folder / "wandb").is_dir():
            attach_report(folder, page, lambda text: note(text))
            where = location or folder
            console.print(f"W&B      {where}/wandb; upload offline runs with: mea-ray sync {where}", soft_wrap=True)
        console.print(f"report   {page}", soft_wrap=True)
    for trial, reason in failed.items():
        console.print(f"[red]failed[/]   {trial}: {escape(reason)}", soft_wrap=True)
    if failed:
        console.print("To retry only the failed trials, run the same command with --resume.")
    return bool(failed)


def _render(
    folder: Path,
    storage: str | None,
    png: Path | None,
    only: Sequence[str],
    prices: PricesConfig | None,
    everything: Sequence[TrialResult] | None = None,
    judged: JudgedSweep | None = None,
) -> Path:
    from mea_ray.report import html

    with refusing(f"the report of {folder} cannot be made", "give a folder that can be read and written"):
        return html.write(
            folder, storage=storage, png=png, only=only, prices=prices, everything=everything, judged=judged
        )


def render_report(
    location: str,
    storage: str | None,
    png: Path | None,
    every_s: float | None,
    *,
    only: Sequence[str] = (),
    price: Sequence[str] = (),
) -> None:
    """Render a sweep's report and print its table.

    Args:
        location: The sweep's folder: a path or a URI.
        storage: Where the victims are stored, if they were moved.
        png: Also write the curves to this PNG file.
        every_s: Seconds between checks for new results, until the sweep has ended; None renders once.
        only: Which trials, see ``html.some``; all if empty.
        price: ``name=value`` of ``PricesConfig``; those of the sweep if empty.
    """
    from mea_ray.cli import status
    from mea_ray.report import html
    from mea_ray.sweep.status import open_folder

    console = make_console()
    folder = _local_folder(location)
    prices = html.prices_of(folder)
    if price:
        tree = prices.model_dump() if prices is not None else {}
        prices = build(PricesConfig, overridden(PricesConfig, tree, list(map(split_override, price)))[0])
    render = partial(_render, folder, storage, png, only, prices)
    everything: Sequence[TrialResult] | None = None
    judged: JudgedSweep | None = None
    if every_s is None:
        everything = read_results(folder)
        judged = JudgedSweep.of(everything)
        gc.freeze()  # thousands of results stay alive until the end; the garbage collector need not scan them
        page: Path | None = render(everything, judged)
    else:
        sweep = open_folder(location)
        page = status.watch(sweep, render, lambda text: console.print(text, soft_wrap=True), every_s=every_s)
    if page is None:
        return
    if everything is None:
        everything = read_results(folder)
    selected = html.some(everything, only) if only else everything
    sought = None if only else search_of(folder)
    print_results(console, selected, sought, sweep=everything, prices=prices, judged=judged)
    console.print(f"\nreport   {page}", soft_wrap=True)
    if tables.is_many(selected):
        console.print(f"table    {page.with_name(html.CSV)}", soft_wrap=True)
    if png:
        console.print(f"picture  {png}", soft_wrap=True)


def _local_folder(location: str) -> Path:
    """Return the local folder of a sweep; the results of a remote one are downloaded first."""
    from mea_ray.sweep.status import open_folder

    if "://" not in location:
        return Path(location)
    sweep = open_folder(location)
    sweep.storage.pull_file(f"{sweep.name}/sweep.yaml")
    sweep.storage.pull_grown(f"{sweep.name}/{EVENTS}")
    sweep.storage.pull_folder(f"{sweep.name}/{RESULTS}")
    return sweep.path


def print_results_as(form: Literal["markdown", "csv"], location: str) -> None:
    """Print the results of a sweep in a format for documents or for other programs.

    Args:
        form: ``markdown`` for tables, ``csv`` for one row per measured model.
        location: The sweep's folder: a path or a URI.
    """
    from mea_ray.report.markdown import report
    from mea_ray.results.frames import load_results

    folder = _local_folder(location)
    text = report(folder) if form == "markdown" else load_results(folder).to_csv(index=False, lineterminator="\n")
    sys.stdout.write(text)


def put_on_record(location: str, target: Path, command: str | None, note: str) -> None:
    """Turn a finished sweep into a record that the documentation can be rendered from."""
    from mea_ray.report.record import make_record

    record = make_record(_local_folder(location), target, command=command, note=note)
    make_console().print(
        f"record   {target}: {record.trials} trials of {record.date}, commit {record.commit}", soft_wrap=True
    )


def render_pages(records: Path, pages: Sequence[Path], images: Path) -> None:
    """Rewrite the marked blocks of Markdown pages from records.

    Args:
        records: The folder of records, ``sweeps/results``.
        pages: The pages.
        images: Folder of the pictures.
    """
    from mea_ray.report.pages import write

    for page in pages:
        changed = write(page, records, images)
        make_console().print(f"{page}: {'rewritten' if changed else 'up to date'}", soft_wrap=True)


def measure(name: str, options: Sequence[str], output: Path | None) -> None:
    """Run a benchmark and show its measurements.

    Args:
        name: Name in the table of benchmarks.
        options: ``name=value`` of its settings.
        output: Also write all measurements to this JSON file.
    """
    from mea_ray.cli.catalogue import BENCHMARKS

    settings, _ = overridden(BENCHMARKS.schema(name), {}, list(map(split_override, options)))
    with make_console(stderr=True).status(f"measuring: {name}"):
        built = BENCHMARKS.build(name, **settings)
    measured = built if isinstance(built, dict) else built.to_dict()
    figures = [(key, value) for key, value in measured.items() if not isinstance(value, (list, dict))]
    make_console().print(pairs_table(f"[bold]{name}[/]", figures))
    if output is not None:
        output.write_text(json.dumps(measured, indent=1, default=str), encoding="utf-8")
