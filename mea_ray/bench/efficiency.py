"""Parallel efficiency of real trials: the same sweep with one worker and with several, alternating, on this machine.

The trials are thefts as in any sweep: they query a service, train substitutes, verify them. Victim and innocent model
are trained beforehand and not measured.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mea_ray.config import SweepConfig, build
from mea_ray.core.errors import ConfigError, MeaRayError
from mea_ray.sweep import cluster, events
from mea_ray.sweep.runner import run_sweep


def bench_efficiency(
    *,
    trials: int = 8,
    workers: int = 2,
    repeats: int = 3,
    budget: int = 1000,
    epochs: int = 10,
    width: float = 0.25,
    model: str = "vgg_like",
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run the same trials on digits with one worker and with ``workers``, each a process with one thread.

    The time runs from the start of the first trial to the end of the last. The services' one replica works beside the
    workers in both cases and reserves nothing: its share of the work is small and the same.

    Args:
        trials: Trials of a sweep, a multiple of ``workers``.
        workers: Trials at once, at most the CPUs of this machine.
        repeats: Turns, each of one sweep with one worker and one with several; medians are compared.
        budget: Queries of each trial.
        epochs: Epochs of each substitute's training.
        width: Width of the networks, 1 is the full one.
        model: Architecture of victim and substitute.
        on_progress: Called with the measurement after each turn.

    Returns:
        ``seconds_1`` and ``seconds_many`` (medians), ``speedup`` of the medians and ``efficiency``, the speed-up per
        worker; ``spread``, the smallest and the largest efficiency of a turn; the settings; the machine's load before.

    Raises:
        ConfigError: A count does not fit the machine.
        MeaRayError: A trial failed.
    """
    there = os.cpu_count() or 1
    if workers < 2 or workers > there:
        raise ConfigError(f"workers={workers} must be from 2 to the {there} CPUs of this machine")
    if trials < workers or trials % workers:
        raise ConfigError(f"trials={trials} must be a multiple of workers={workers}, or the last round is not full")
    if repeats < 1:
        raise ConfigError(f"repeats={repeats} must be at least 1")
    load = os.getloadavg()[0]
    taken: dict[int, list[float]] = {1: [], workers: []}
    with tempfile.TemporaryDirectory(prefix="mea_ray_bench_") as home:
        tree = _sweep(home, trials, budget, epochs, {"name": model, "width": width})
        _seconds({**tree, "name": "models", "space": {}}, workers)  # trains what all share
        for turn in range(repeats):
            # The order is turned round each time: a machine that becomes busier must not favour one side.
            for count in (1, workers) if turn % 2 == 0 else (workers, 1):
                taken[count].append(_seconds({**tree, "name": f"turn{turn}-{count}"}, count))
            if on_progress is not None:
                on_progress(f"1 worker {taken[1][-1]:.1f} s, {workers} workers {taken[workers][-1]:.1f} s")
    alone, many = statistics.median(taken[1]), statistics.median(taken[workers])
    each = [one / (workers * several) for one, several in zip(taken[1], taken[workers], strict=True)]
    return {
        "seconds_1": alone,
        "seconds_many": many,
        "speedup": alone / many,
        "efficiency": alone / (workers * many),
        "spread": (min(each), max(each)),
        "trials": trials,
        "workers": workers,
        "repeats": repeats,
        "budget": budget,
        "epochs": epochs,
        "width": width,
        "model": model,
        "cpus": there,
        "load": load,
    }


def _sweep(home: str, trials: int, budget: int, epochs: int, network: dict[str, Any]) -> dict[str, Any]:
    training = {"epochs": epochs}
    base = {
        "storage": home,
        "victim": {"model": network, "training": {"epochs": 2}},
        "thief": {"model": network, "training": training, "budgets": [budget]},
        "service": {"cpus_per_replica": 0.0},
        "tracking": {"wandb": "disabled"},
    }
    return {"base": base, "space": {"seed": {"grid": list(range(trials))}}}


def _seconds(tree: dict[str, Any], workers: int) -> float:
    """Run a sweep on a Ray of its own with ``workers`` CPUs; return the seconds that its trials took."""
    import ray

    began: list[float] = []
    ended: list[float] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TrialStarted):
            began.append(time.perf_counter())
        elif isinstance(event, events.TrialFinished):
            ended.append(time.perf_counter())

    # Ray runs its workers at nice 15: beside anything else on the machine they would hardly run at all.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with cluster.quiet():
        ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
        try:
            outcome = run_sweep(build(SweepConfig, tree), on_event=listen)
        finally:
            ray.shutdown()
    if outcome.failed:
        raise MeaRayError(f"{Path(outcome.folder).name}: {'; '.join(outcome.failed.values())}")
    return ended[-1] - began[0]
