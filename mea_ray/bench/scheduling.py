"""Utilisation of a cluster by a sweep: simulated for many GPUs, and checked against a real small sweep.

The simulation follows the schedule of real sweeps (`sweep.schedule`). The real sweep has all of the machinery (Tune,
services, events), but its trials sleep; the simulation of it takes from it how long a service takes to start and what a
slot loses for a trial; how near it comes to the real duration is among the figures.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mea_ray.bench.sweep import collect, launch
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.versions import versions
from mea_ray.sweep.schedule import best_services
from mea_ray.sweep.simulation import Simulated, Simulation, workload

SPREAD = 0.35
"""Standard deviation of the logarithm of a trial's duration."""
_TINY = {"name": "vgg_like", "width": 0.0625}
Timeline = Sequence[tuple[float, str, str, int]]


def bench_scheduling(
    *,
    gpus: tuple[int, ...] = (16, 64, 128),
    trials: int = 1000,
    victims: int = 50,
    trial_s: float = 551.0,
    victim_s: float = 3240.0,
    start_s: float = 60.0,
    overhead_s: float = 5.0,
    service_gpus: float = 0.25,
    services: int | None = None,
    check: bool = True,
    check_trials: int = 24,
    check_victims: int = 4,
    check_s: float = 4.0,
    folder: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Simulate a sweep on clusters of several sizes, and check the simulation against a real one on this machine.

    Args:
        gpus: Sizes of clusters; a trial, and the training of a victim, takes one GPU.
        trials: Trials of the simulated sweep.
        victims: Its victims.
        trial_s: Mean duration of a trial; durations are lognormal.
        victim_s: Duration of the training of a victim.
        start_s: Seconds until a service answers.
        overhead_s: Seconds that a GPU loses for each trial.
        service_gpus: GPUs of a service.
        services: Services up at once; as ``max_services: auto`` chooses when None.
        check: Whether a real sweep of stand-ins is run, too.
        check_trials: Its trials, two at once.
        check_victims: Its victims, one served at a time.
        check_s: What its trials take: they sleep.
        folder: Where it is kept; removed afterwards when None.
        on_progress: Called with a sentence after each part.

    Returns:
        For each size ``of_ideal_N`` (all work divided by all GPUs, over the time taken), ``hours_N``,
        ``ideal_hours_N``, ``first_trial_hours_N`` and ``services_N``; ``one_service_hours_N`` with ``max_services: 1``.
        With ``check``: ``real_s`` of the real trials,
        from the first that began to the last that ended, ``simulated_s``, ``simulated_by_real``, and what was measured
        for the simulation: ``measured_start_s`` and ``measured_overhead_s``.

    Raises:
        ConfigError: A number does not fit.
        MeaRayError: The real sweep failed.
    """
    if trials < victims or victims < 1 or min(gpus, default=0) < 2:
        raise ConfigError(f"trials={trials}, victims={victims}, gpus={gpus}: give at least one trial a victim, 2 GPUs")
    notify = on_progress or (lambda text: None)
    random = numpy_generator(0, "bench scheduling").lognormal(-(SPREAD**2) / 2, SPREAD, trials)
    durations = np.asarray(random * trial_s)
    work = workload(
        trials,
        victims,
        trial_s=lambda index: float(durations[index]),
        victim_s=victim_s,
        start_s=start_s,
        overhead_s=overhead_s,
        service=service_gpus,
    )
    measured: dict[str, Any] = {}
    for size in gpus:
        room = {n: int(size - n * service_gpus) for n in range(1, victims + 1) if size - n * service_gpus >= 1}
        result = Simulation(work, size, services or best_services(victims, trials, len(room), room)).run()
        measured |= {**_row(size, result), f"one_service_hours_{size}": Simulation(work, size, 1).run().seconds / 3600}
        notify(f"{size} GPUs: {result.of_ideal:.1%} of the ideal, {result.services} services at once")
    if check:
        with tempfile.TemporaryDirectory(prefix="mea_ray_bench_") as aside:
            home = Path(folder or aside).absolute()
            measured |= _checked(home, check_trials, check_victims, check_s)
    settings = {"trials": trials, "victims": victims, "trial_s": trial_s, "victim_s": victim_s, "start_s": start_s}
    return {**measured, **settings, "service_gpus": service_gpus, "gpus": list(gpus), "versions": versions()}


def table(result: Mapping[str, Any]) -> str:
    """Return what `bench_scheduling` simulated as Markdown."""
    lines = [
        "| GPUs | services at once | hours | ideal hours | of the ideal | first trial after | hours with one service |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in result["gpus"]:
        hours, ideal, first, one = (
            f"{result[f'{name}_{size}']:.1f}"
            for name in ("hours", "ideal_hours", "first_trial_hours", "one_service_hours")
        )
        share = f"{result[f'of_ideal_{size}']:.0%}"
        lines.append(f"| {size} | {result[f'services_{size}']} | {hours} | {ideal} | {share} | {first} h | {one} |")
    return "\n".join(lines)


def check_line(result: Mapping[str, Any]) -> str:
    """Return how near the simulation came to a real sweep, as a sentence."""
    return (
        f"As a check, a real sweep of sleeping trials took {result['real_s']:.0f} s and its simulation "
        f"{result['simulated_s']:.0f} s, {result['simulated_by_real']:.2f} times as long."
    )


def _row(size: int, result: Simulated) -> dict[str, Any]:
    return {
        f"of_ideal_{size}": result.of_ideal,
        f"hours_{size}": result.seconds / 3600,
        f"ideal_hours_{size}": result.ideal_s / 3600,
        f"first_trial_hours_{size}": result.first_trial_s / 3600,
        f"services_{size}": result.services,
    }


def _checked(home: Path, trials: int, victims: int, seconds: float) -> dict[str, Any]:
    """Run a real sweep with one service and two slots, and simulate the same."""
    real = collect(launch(home, "real", _sweep(home, trials, victims), seconds))
    timeline: Timeline = [(float(at), str(kind), str(name), int(pid)) for at, kind, name, pid in real["timeline"]]
    start_s, overhead_s = between_services(timeline), around_trials(timeline, seconds)
    work = workload(
        trials,
        victims,
        trial_s=lambda index: seconds,
        victim_s=0.0,
        start_s=start_s,
        overhead_s=overhead_s,
        service=1.0,
    )
    result = Simulation(work, 3, 1).run()
    simulated_s = result.seconds - result.first_trial_s
    return {
        "real_s": real["trials_s"],
        "simulated_s": simulated_s,
        "simulated_by_real": simulated_s / real["trials_s"],
        "measured_start_s": start_s,
        "measured_overhead_s": overhead_s,
        "failed": real["failed"],
    }


def _sweep(home: Path, trials: int, victims: int) -> dict[str, Any]:
    base = {
        "storage": str(home),
        "victim": {"model": _TINY, "training": {"epochs": 1}},
        "thief": {"model": _TINY, "training": {"epochs": 1}, "budgets": [48]},
        "verification": {"samples": 50, "null_models": 1},
        "service": {"cpus_per_replica": 0.1},
        "resources": {"victim": {"cpus": 0.5}, "trial": {"cpus": 0.8}},
        "tracking": {"wandb": "disabled", "log_models": False},
    }
    space = {
        "victim.seed": {"grid": list(range(victims))},
        "seed": {"grid": list(range(trials // victims))},
    }
    return {"name": "real", "base": base, "space": space, "max_services": 1}


def between_services(timeline: Timeline) -> float:
    """Return the mean of the seconds that all slots lose when one service follows another.

    That is from the last end of a trial of one to the first begin of a trial of the next, which has to wait for its
    process, too. Of all services but the first; one is up at a time.
    """
    waits = []
    last, started = 0.0, False
    for at, kind, _, _ in timeline:
        if kind == "ended":
            last = at
        elif kind == "service":
            started = bool(last)
        elif kind == "begun" and started:
            waits.append(at - last)
            started = False
    return statistics.fmean(waits) if waits else 0.0


def around_trials(timeline: Timeline, seconds: float) -> float:
    """Return what a slot loses for a trial: its duration beside its sleep, and the pause before the process's next.

    Pauses in which a service was started are left out.
    """
    begun: Mapping[str, float] = {name: at for at, kind, name, _ in timeline if kind == "begun"}
    process = {name: pid for _, kind, name, pid in timeline if kind == "begun"}
    beside = [at - begun[name] - seconds for at, kind, name, _ in timeline if kind == "ended" and name in begun]
    pauses: list[float] = []
    ended: dict[int, float] = {}
    for at, kind, name, pid in timeline:
        if kind == "service":
            ended.clear()
        elif kind == "ended" and name in process:
            ended[process[name]] = at
        elif kind == "begun" and pid in ended:
            pauses.append(at - ended.pop(pid))
    return statistics.fmean(beside) + (statistics.fmean(pauses) if pauses else 0.0)
