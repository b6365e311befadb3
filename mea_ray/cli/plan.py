"""``mea-ray plan``: the cost of a sweep on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mea_ray.config import SweepConfig
from mea_ray.report.terminal import make_console, pairs_table
from mea_ray.results.points import label, shortened
from mea_ray.sweep.plan import Plan

if TYPE_CHECKING:
    from mea_ray.sweep import cluster
    from mea_ray.sweep.estimate import Estimate
    from mea_ray.sweep.forecast import Forecast

MAX_TRIALS = 40
"""Trials listed; a sweep may have thousands."""


def show(console: Console, sweep: SweepConfig, address: str | None = None) -> None:
    """Plan a sweep, check it against its data as a run does, and print what it needs.

    Args:
        console: Where to.
        sweep: The sweep.
        address: Ray cluster whose resources are checked; None checks this machine.

    Raises:
        ConfigError: The sweep cannot be run, or the cluster cannot be reached.
        DataError: The data do not fit the sweep.
    """
    from mea_ray.storage.remote import Storage
    from mea_ray.sweep import cluster, tune_classes
    from mea_ray.sweep.broker import demand_of
    from mea_ray.sweep.estimate import Measured, estimate, room, this_machine
    from mea_ray.sweep.forecast import forecast
    from mea_ray.sweep.loading import load_here
    from mea_ray.sweep.plan import draft, plan
    from mea_ray.sweep.search import check_metric

    address = cluster.check_address(address)
    check_metric(sweep)
    tune_classes.check(sweep)
    Storage(sweep.base.storage)  # rejects an impossible folder; nothing is written
    drafts = draft(sweep)
    measured = Measured()
    with make_console(stderr=True).status("reading the data, and measuring a few steps of training"):
        contents, unread = load_here(drafts, measured.measure)
        total = this_machine() if address is None else cluster.resources_of(address)
    planned = plan(sweep, contents, drafts)
    configs = [each.config for each in drafts]
    demand = demand_of(sweep, configs).resolved(total)
    at_once, missing = room(demand, total)
    auto = demand_of(sweep.changed(max_services="auto"), configs).resolved(total)
    taken = estimate(planned, measured, sweep.keep)
    coming = forecast(planned, measured, demand, at_once, (auto, room(auto, total)[0]))
    where = "this machine" if address is None else f"the cluster at {address}"
    has = f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    needed = {} if taken is None else _needs(taken, sweep, demand, at_once, coming, here=address is None)
    needed["room"] = f"{where} ({has}) runs {at_once} trials at once" if at_once else f"{where} ({has}) is too small"
    print_plan(console, sweep, planned, needed, demand.services)
    if missing:
        console.print(f"[yellow]no room[/] {escape(missing)}", soft_wrap=True)
    if coming is not None and coming.idle:
        console.print(f"[yellow]idle[/] {escape(coming.idle)}", soft_wrap=True)
    for reason in unread:
        console.print(
            f"[yellow]not checked[/] against data that cannot be read here; names are provisional: {escape(reason)}",
            soft_wrap=True,
        )


def _needs(
    taken: Estimate, sweep: SweepConfig, demand: cluster.Demand, at_once: int, coming: Forecast | None, *, here: bool
) -> dict[str, str]:
    """Return time, memory and disk as rows of the table, with a note if this machine has less."""
    from mea_ray.sweep.estimate import free_disk, memory

    models = f"models {_duration(taken.models_s)}, substitutes {_duration(taken.substitutes_s)}"
    about = "about" if taken.complete else "very roughly"
    seconds = (taken.models_s + taken.substitutes_s) / max(1, at_once) if coming is None else coming.seconds
    wall = f"; {_duration(seconds)} with {at_once} at once" if at_once else ""
    processes = max(1, at_once) + demand.services * demand.replicas
    short_of_memory = here and taken.data + processes * taken.process > memory()
    short_of_disk = "://" not in sweep.base.storage and taken.disk + taken.answers > free_disk(sweep.base.storage)
    return {
        "training": f"{about} {models}, one after the other{wall} (measured on {taken.measured_on}; without queries)",
        "memory": f"{_size(taken.data)} of data in Ray's object store, about {_size(taken.process)} for each of "
        f"{processes} processes (trials at once and replicas)"
        + (f"; this machine has {_size(memory())} only" if short_of_memory else ""),
        "storage": f"{_size(taken.disk)} of models, {_size(taken.answers)} of answers"
        + (f"; only {_size(free_disk(sweep.base.storage))} are free" if short_of_disk else ""),
        "ledgers and logs": f"{_size(taken.logs)} on the driver's machine (`keep` sets what remains of a finished "
        "trial)",
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


def print_plan(console: Console, sweep: SweepConfig, plan: Plan, needs: Mapping[str, str], services: int) -> None:
    """Print totals and what they need, then the trials."""
    from mea_ray.sweep.estimate import choosing_models

    most = "at most " if plan.adaptive or sweep.scheduler.name != "fifo" or sweep.stop else ""
    rungs = len(sweep.base.thief.budgets) * plan.trial_count if plan.adaptive else None
    substitutes = rungs if rungs is not None else sum(len(t.config.thief.budgets) for t in plan.trials)
    choosing = sum(choosing_models(victim.config) for victim in plan.victims.values())
    service = sweep.base.service
    cpus = services * service.replicas * service.cpus_per_replica
    gpus = services * service.replicas * service.gpus_per_replica
    totals = {
        "trials": f"{plan.trial_count:,}",
        **({"seeds": f"{len(sweep.seed_points)} for each point"} if sweep.seeds is not None else {}),
        "distinct victims": f"{most}{plan.victim_count:,}",
        "null models": f"{most}{plan.null_count:,}",
        **({"models that choose samples": f"{most}{choosing:,}"} if choosing else {}),
        "substitutes": f"{most}{substitutes:,}",
        "queries": f"{most}{plan.queries:,}",
        "services at once": f"{services} ({cpus:g} CPUs, {gpus:g} GPUs set aside)",
        "one trial": f"{sweep.base.resources.trial.cpus:g} CPUs, {sweep.base.resources.trial.gpus:g} GPUs",
    }
    totals |= needs
    if plan.duplicates:
        totals["duplicates"] = f"{plan.duplicates:,} points repeat the experiment of another point; not run twice"
    console.print(pairs_table(f"[bold]{escape(plan.name)}[/]", totals.items()))
    grid = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("Trial", "left"), ("Setting", "left"), ("Victim", "left"), ("Budgets", "right")):
        grid.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    short = shortened([trial.point for trial in plan.trials])
    for trial, point in zip(plan.trials[:MAX_TRIALS], short, strict=False):
        budgets = ", ".join(f"{budget:,}" for budget in trial.config.thief.budgets)
        grid.add_row(trial.name[:8], escape(label(point, seeds=True)), trial.victim[:8], budgets)
    if plan.adaptive:
        console.print("The search chooses its points while it runs; these points were only checked:")
    console.print(grid)
    if len(plan.trials) > MAX_TRIALS:
        console.print(f"... and {len(plan.trials) - MAX_TRIALS:,} more")
