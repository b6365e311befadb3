"""A dummy trial, and the process that drives a sweep of them: the whole infrastructure without the experiments.

``python -m mea_ray.bench.stand_in SETTINGS.json`` runs one sweep (see ``drive``).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_ray.config import SweepConfig, build
from mea_ray.core.seeding import numpy_generator
from mea_ray.results.numbers import trial_metrics
from mea_ray.results.portable import anonymous
from mea_ray.results.records import ModelReport, QueryLogRecord, RungResult, SuccessRate, TrialResult
from mea_ray.sweep import events
from mea_ray.sweep.plan import PlannedTrial, plan
from mea_ray.sweep.trial import Tools

if TYPE_CHECKING:
    from mea_ray.core.types import Splits

BEGUN = "begun.log"
"""File in the sweep's folder: a line with its name for every time that a trial's work began."""


def stand_in(
    trial: PlannedTrial, load_data: Callable[[], Splits], tools: Tools, pid: int, node: str, *, seconds: float
) -> TrialResult:
    """Sleep in place of a theft; store and report what a trial would, with made-up numbers.

    Args:
        trial: The trial.
        load_data: Loads its data.
        tools: What the sweep lends.
        pid: This process.
        node: Ray's id of this node.
        seconds: What the theft takes.
    """
    done = tools.folder.result(trial.name)
    if done is not None:
        for rung in done.rungs:
            tools.reports.rung(trial_metrics(done, rung), rung.epochs)
        return done
    with open(tools.folder.path / BEGUN, "a", encoding="utf-8") as begun:
        begun.write(f"{trial.name}\n")
    started = time.perf_counter()
    work, budgets = tools.folder.trial(trial.name), trial.config.thief.budgets
    work.folder.mkdir(parents=True, exist_ok=True)
    work.save_point(trial.point)
    tools.on_event(events.TrialStarted(trial.name, trial.point, pid, node, budgets, 0))
    load_data()
    rungs: list[RungResult] = []
    for budget in budgets:
        time.sleep(seconds / len(budgets))
        rung = RungResult(budget=budget, queries=budget, report=_report(trial, budget), epochs=1, seconds=seconds)
        rungs.append(rung)
        work.keep(f"rungs/{budget}", rung)
        result = TrialResult(
            trial=trial.name,
            point=trial.point,
            config=anonymous(trial.config.resolved()),
            victim=trial.victim,
            nulls=list(trial.nulls),
            victim_report=_report(trial, 0),
            null_reports=[_report(trial, -1)],
            rungs=rungs,
            status="finished" if len(rungs) == len(budgets) else "stopped",
            queries_charged=budget,
            query_log={trial.name: QueryLogRecord(requests=1, images=budget, classes=[budget // 10] * 10)},
            seconds=time.perf_counter() - started,
            device="none",
            versions={},
        )
        work.keep_partial(result)
        tools.on_event(events.rung_finished(trial.name, rung))
        if result.status == "finished":
            result.save(tools.folder.result_path(trial.name))
        tools.reports.rung(trial_metrics(result, rung), rung.epochs)
    return result


def _report(trial: PlannedTrial, budget: int) -> ModelReport:
    accuracy, hits = numpy_generator(trial.config.seed, "stand-in", trial.name, budget + 1).random(2)
    wsr = SuccessRate(successes=int(1000 * hits), trials=1000, rate=float(hits), low=float(hits), high=float(hits))
    return ModelReport(accuracy=float(accuracy), fidelity=float(accuracy), wsr=wsr, wfpr={"stripes": wsr})


def peak_memory() -> float:
    """Return the most memory that this process ever had resident, in MiB.

    The kernel's own high-water mark of this program: ``getrusage`` also counts the process that started it.
    """
    import resource

    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (1024**2 if sys.platform == "darwin" else 1024)


class SpeedWatch:
    """Listens to a sweep: when trials end, and what the driver's memory is then."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.begun = self.ended = 0.0
        self.finished = 0
        self.memory: list[tuple[int, float]] = []
        self.timeline: list[tuple[float, str, str, int]] = []
        """When what happened, to what, in which process; 0 where that does not matter."""

    def __call__(self, event: events.Event) -> None:
        """Take an event."""
        import psutil

        now = time.monotonic()
        if isinstance(event, events.ServiceStarted):
            self.timeline.append((now, "service", event.victim, 0))
        if isinstance(event, events.ModelReady):
            self.timeline.append((now, "model", event.name, 0))
        if isinstance(event, events.TrialStarted):
            self.timeline.append((now, "begun", event.trial, event.pid))
        if isinstance(event, events.TrialFinished):
            self.timeline.append((now, "ended", event.trial, 0))
        if isinstance(event, events.TrialStarted) and not self.begun:
            self.begun = time.monotonic()
        if isinstance(event, events.TrialFinished):
            self.finished += 1
            self.ended = time.monotonic()
            if self.finished % self.every == 0:
                self.memory.append((self.finished, psutil.Process().memory_info().rss / 1024**2))


def drive(tree: dict[str, Any], seconds: float, *, resume: bool) -> dict[str, Any]:
    """Run a sweep of stand-ins in this process.

    Args:
        tree: The sweep.
        seconds: What a trial takes.
        resume: Go on with what an earlier process left.

    Returns:
        ``plan_s``; ``before_s`` and ``after_s``: until the first trial began, and from the end of the last one;
        ``trials_s`` between; ``peak_mib``; ``memory``: (trials finished, MiB) as it went; ``finished`` in this process;
        ``timeline``, see `Watch`.
    """
    from mea_ray.sweep.runner import run_sweep

    sweep = build(SweepConfig, tree)
    start = time.monotonic()
    trials = plan(sweep).trial_count
    planned = time.monotonic()
    watch = SpeedWatch(max(1, trials // 20))
    outcome = run_sweep(sweep, resume=resume, on_event=watch, work=partial(stand_in, seconds=seconds))
    end = time.monotonic()
    return {
        "plan_s": planned - start,
        "before_s": watch.begun - planned,
        "trials_s": watch.ended - watch.begun,
        "after_s": end - watch.ended,
        "peak_mib": peak_memory(),
        "memory": watch.memory,
        "timeline": watch.timeline,
        "finished": watch.finished,
        "failed": len(outcome.failed),
    }


def main(path: Path) -> None:
    """Run what a settings file says; the numbers are written beside it."""
    from mea_ray.bench import stand_in as module  # by this name the trials' processes find it, too

    settings = json.loads(path.read_text(encoding="utf-8"))
    measured = module.drive(settings["sweep"], settings["seconds"], resume=settings["resume"])
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(measured), encoding="utf-8")
    aside.replace(path.with_suffix(".measured"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
