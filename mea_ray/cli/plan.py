"""``mea-ray plan``: the cost of a sweep on one screen."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mea_ray.config import SweepConfig
from mea_ray.report.terminal import make_console, pairs_table
from mea_ray.results.points import label
from mea_ray.sweep.plan import Plan

SHOWN = 40
"""Trials listed; a sweep may have thousands."""


def show(console: Console, sweep: SweepConfig) -> None:
    """Work a sweep out, check it against its data as a run does, and print what it will cost.

    Raises:
        ConfigError: The sweep cannot be run.
        DataError: Its data do not fit it.
    """
    from mea_ray.sweep.loading import load_here
    from mea_ray.sweep.plan import draft, plan
    from mea_ray.sweep.search import check_metric

    check_metric(sweep)
    drafts = draft(sweep)
    with make_console(stderr=True).status("reading the data"):
        contents, unread = load_here(drafts)
    print_plan(console, sweep, plan(sweep, contents, drafts))
    for reason in unread:
        console.print(
            f"[yellow]not checked[/] against data that cannot be read here, so that names are provisional: "
            f"{escape(reason)}",
            soft_wrap=True,
        )


def print_plan(console: Console, sweep: SweepConfig, plan: Plan) -> None:
    """Print totals, then victims, then trials."""
    most = "at most " if plan.adaptive or sweep.scheduler.name == "asha" else ""
    rungs = len(sweep.base.thief.budgets) * plan.trial_count if plan.adaptive else None
    substitutes = rungs if rungs is not None else sum(len(t.config.thief.budgets) for t in plan.trials)
    service = sweep.base.service
    cpus = min(sweep.max_services, plan.victim_count) * service.replicas * service.cpus_per_replica
    gpus = min(sweep.max_services, plan.victim_count) * service.replicas * service.gpus_per_replica
    totals = {
        "trials": f"{plan.trial_count:,}",
        **({"seeds": f"{len(sweep.seed_points)} for each point"} if sweep.seeds is not None else {}),
        "distinct victims": f"{most}{plan.victim_count:,}",
        "null models": f"{most}{plan.null_count:,}",
        "substitutes": f"{most}{substitutes:,}",
        "queries": f"{most}{plan.queries:,}",
        "services at once": f"{min(sweep.max_services, plan.victim_count)} ({cpus:g} CPUs, {gpus:g} GPUs set aside)",
        "one trial": f"{sweep.base.resources.trial.cpus:g} CPUs, {sweep.base.resources.trial.gpus:g} GPUs",
    }
    if plan.duplicates:
        totals["duplicates"] = f"{plan.duplicates:,} points give an experiment that is there already; not run again"
    console.print(pairs_table(f"[bold]{escape(plan.name)}[/]", totals.items()))
    shown = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("Trial", "left"), ("Setting", "left"), ("Victim", "left"), ("Budgets", "right")):
        shown.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for trial in plan.trials[:SHOWN]:
        budgets = ", ".join(f"{budget:,}" for budget in trial.config.thief.budgets)
        shown.add_row(trial.name[:8], escape(label(trial.point, seeds=True)), trial.victim[:8], budgets)
    if plan.adaptive:
        console.print("The search chooses its points while it runs; these were only checked:")
    console.print(shown)
    if len(plan.trials) > SHOWN:
        console.print(f"... and {len(plan.trials) - SHOWN:,} more")
