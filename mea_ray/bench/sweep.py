"""Overhead of a sweep: time per trial, the driver's memory over the trials, and a kill half way.

Everything is real (plan, Ray Tune, the trials' processes, events, results, resume), but a trial sleeps instead of
stealing. Each sweep is driven by a process of its own, with a Ray of its own.

Measured on two cores that other work kept busy (load 27: times are upper limits), trials of 0.1 s, 4 at once: 0.25 s of
wall time per trial, and 7.5 s before processes were reused; the driver's peak 924 MiB at 100 trials and 1,010 MiB at
1,000 (x 1.09, 43 KiB per trial; most of it are torch and Ray); killed at 501 of 1,000 and resumed: none of the 501
repeated, one that was under way begun again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mea_ray.bench.stand_in import BEGUN
from mea_ray.core.errors import ConfigError, MeaRayError

_TINY = {"name": "vgg_like", "width": 0.0625}
_SEEDS = 10


def bench_sweep(
    *,
    trials: int = 1000,
    few: int = 100,
    seconds: float = 0.1,
    at_once: int = 4,
    cpus: float | None = None,
    wandb: Literal["disabled", "offline"] = "disabled",
    kill: bool = True,
    folder: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a small sweep and a large one, and the large one again with its driver killed half way and resumed.

    A victim and an innocent model are trained once, for seconds, in each sweep; this is not part of a trial.

    Args:
        trials: Trials of the large sweep, a multiple of 10: ten seeds of each point.
        few: Trials of the small sweep, a multiple of 10.
        seconds: What a trial takes: it sleeps.
        at_once: Trials at once.
        cpus: CPUs of this machine that they share; all of them when None.
        wandb: Whether W&B is kept (offline) beside.
        kill: Whether the large sweep is run again, killed and resumed.
        folder: Where the sweeps are kept; removed afterwards when None.
        on_progress: Called with the measurement after each sweep.

    Returns:
        For the large sweep: ``plan_s``, ``seconds_per_trial`` (wall time between two ends of trials),
        ``overhead_s`` (what one of the ``at_once`` places loses per trial beside the trial itself), ``before_s``
        and ``after_s`` (until the first trial began, after the last had ended). ``peak_mib`` and ``peak_mib_few``: the
        drivers' peaks; ``memory_ratio`` of them; ``kib_per_trial``: how the large sweep's driver grew over its second
        half. With ``kill``: ``finished_before`` the kill, ``repeated`` of them afterwards (should be none),
        ``begun_again`` (were under way at the kill), ``missing`` (should be none).

    Raises:
        ConfigError: A count does not fit.
        MeaRayError: A sweep failed; the message has the end of what it printed.
    """
    for name, value in {"trials": trials, "few": few}.items():
        if value < _SEEDS or value % _SEEDS:
            raise ConfigError(f"{name}={value} must be a multiple of {_SEEDS}: the sweeps have {_SEEDS} seeds")
    if at_once < 1 or seconds < 0:
        raise ConfigError(f"at_once={at_once} must be at least 1, and seconds={seconds} at least 0")
    notify = on_progress or (lambda text: None)
    share = (float(cpus or os.cpu_count() or 1) - 0.1) / at_once
    with tempfile.TemporaryDirectory(prefix="mea_ray_bench_") as aside:
        home = Path(folder or aside).absolute()

        def measured(name: str, count: int, *, resume: bool = False) -> dict[str, Any]:
            figures = collect(launch(home, name, _sweep(home, name, count, share, wandb), seconds, resume=resume))
            took, finished, peak = figures["trials_s"], figures["finished"], figures["peak_mib"]
            notify(f"{name}: {took:.1f} s for {finished} trials, peak {peak:.0f} MiB")
            return figures

        small, large = measured("few", few), measured("many", trials)
        killed: dict[str, Any] = {}
        if kill:
            tree = _sweep(home, "killed", trials, share, wandb)
            begun, finished = _killed(launch(home, "killed", tree, seconds), home / "killed", trials // 2)
            resumed = measured("killed", trials, resume=True)
            killed = {**_repeats(home / "killed", begun, finished, trials), "resume_plan_s": resumed["plan_s"]}
    per_trial = large["trials_s"] / large["finished"]
    return {
        "plan_s": large["plan_s"],
        "seconds_per_trial": per_trial,
        "overhead_s": per_trial * at_once - seconds,
        "before_s": large["before_s"],
        "after_s": large["after_s"],
        "peak_mib_few": small["peak_mib"],
        "peak_mib": large["peak_mib"],
        "memory_ratio": large["peak_mib"] / small["peak_mib"],
        "kib_per_trial": _slope(large["memory"]),
        **killed,
        "failed": small["failed"] + large["failed"],
        "trials": trials,
        "few": few,
        "seconds": seconds,
        "at_once": at_once,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "wandb": wandb,
        "memory": large["memory"],
    }


def _sweep(home: Path, name: str, trials: int, share: float, wandb: str) -> dict[str, Any]:
    rates = [1e-4 * (1 + place) for place in range(trials // _SEEDS)]
    base = {
        "storage": str(home),
        "victim": {"model": _TINY, "training": {"epochs": 1}},
        "thief": {"model": _TINY, "training": {"epochs": 1}, "budgets": [48, 96]},
        "verification": {"samples": 50},
        "service": {"cpus_per_replica": 0.1},
        "resources": {"victim": {"cpus": 0.5}, "trial": {"cpus": share}},
        "tracking": {"wandb": wandb, "log_models": False},
    }
    space = {"thief.training.learning_rate": {"grid": rates}, "seed": {"grid": list(range(_SEEDS))}}
    return {"name": name, "base": base, "space": space}


def launch(
    home: Path, name: str, tree: dict[str, Any], seconds: float, *, resume: bool = False
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a process that runs a sweep of stand-ins, see `stand_in.drive`; what it measures is read by `collect`."""
    settings = home / f"{name}.json"
    settings.write_text(json.dumps({"sweep": tree, "seconds": seconds, "resume": resume}), encoding="utf-8")
    # Ray runs its workers at nice 15: on a machine that is busy with something else they would hardly run at all.
    environment = {"RAY_worker_niceness": "0", **os.environ, "RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[2])  # works from a checkout that is not installed, too
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with settings.with_suffix(".printed").open("wb") as printed:
        command = [sys.executable, "-m", "mea_ray.bench.stand_in", str(settings)]
        return subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT), settings


def collect(started: tuple[subprocess.Popen[bytes], Path]) -> dict[str, Any]:
    """Wait for a process that `launch` started, and return what it measured.

    Raises:
        MeaRayError: The sweep failed; the message has the end of what it printed.
    """
    process, settings = started
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    if code:
        printed = settings.with_suffix(".printed").read_text(encoding="utf-8", errors="replace")
        raise MeaRayError(f"the sweep {settings.stem!r} ended with exit code {code}:\n{printed[-2000:]}")
    measured: dict[str, Any] = json.loads(settings.with_suffix(".measured").read_text(encoding="utf-8"))
    return measured


def _killed(started: tuple[subprocess.Popen[bytes], Path], sweep: Path, at: int) -> tuple[Counter[str], set[str]]:
    """Kill a driver when so many of its trials have finished; return what had begun and what had finished."""
    process, _ = started
    while len(_finished(sweep)) < at:
        if process.poll() is not None:
            collect(started)
            raise MeaRayError(f"the sweep ended before its driver could be killed at {at} trials; raise `seconds`")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Its trials outlive it for a moment: Ray ends them when it notices.
    seen: set[str] = set()
    while (now := _finished(sweep)) != seen:
        seen = now
        time.sleep(2.0)
    return _begun(sweep), seen


def _finished(sweep: Path) -> set[str]:
    return {path.stem for path in (sweep / "results").glob("[!.]*.json")}


def _begun(sweep: Path) -> Counter[str]:
    return Counter((sweep / BEGUN).read_text(encoding="utf-8").split())


def _repeats(sweep: Path, before: Counter[str], finished: set[str], trials: int) -> dict[str, int]:
    again = _begun(sweep) - before
    return {
        "finished_before": len(finished),
        "repeated": len(finished & set(again)),
        "begun_again": len((set(before) - finished) & set(again)),
        "missing": trials - len(_finished(sweep)),
    }


def _slope(memory: list[tuple[int, float]]) -> float:
    """Return the growth over the second half, in KiB per trial, by least squares."""
    import numpy as np

    half = memory[len(memory) // 2 :]
    if len(half) < 2:
        return float("nan")
    counts, mib = zip(*half, strict=True)
    return float(np.polyfit(counts, mib, 1)[0] * 1024)
