from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_sweep

from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.ledger import Ledger
from mea_ray.config import SweepConfig, build, merge, write_yaml
from mea_ray.core.errors import ConfigError
from mea_ray.sweep import events
from mea_ray.sweep.plan import plan
from mea_ray.sweep.runner import run_sweep


def charged(folder: Path) -> dict[str, int]:
    """What the ledgers on disk say that each trial was charged."""
    total: dict[str, int] = {}
    for path in (folder / "ledgers").glob("*.sqlite"):
        ledger = Ledger(path)
        for client in ledger.clients():
            total[client] = total.get(client, 0) + ledger.charged(client)
        ledger.close()
    return total


def quick(sweep: SweepConfig) -> SweepConfig:
    """The sweep with thefts alone, and more queries a second."""
    base = merge(
        sweep.base.resolved(),
        {
            "service.rate": {"images_per_second": 64, "burst": 16},
            "verification.stolen_null_models": 0,
            "removal.methods": [],
            "detection.methods": [],
        },
    )
    return build(SweepConfig, {**sweep.resolved(), "base": base})


def test_a_killed_trial_goes_on_and_is_charged_once_and_a_broken_one_fails_alone(
    tmp_path: Path, ray_session: None
) -> None:
    sweep = tiny_sweep(tmp_path)
    *good, bad = [trial.name for trial in plan(sweep).trials]
    transfer = tmp_path / "s" / "trials" / bad / "transfer"
    transfer.mkdir(parents=True)
    # Answers of another thief: asking them again would not be the same experiment.
    answers = np.full((4, 10), 0.1, np.float32)
    TransferSet(transfer).append(np.array([9, 9, 9, 9]), answers)
    received: list[events.Event] = []
    pids: dict[str, int] = {}
    killed: list[str] = []

    def listen(event: events.Event) -> None:
        received.append(event)
        if isinstance(event, events.TrialStarted):
            pids.setdefault(event.trial, event.pid)
        if isinstance(event, events.Queried) and event.trial != bad and not killed:
            # It asks, and at 16 images a second it is charged for some that it has not kept: none is kept yet.
            assert event.answers < 48
            killed.append(event.trial)
            os.kill(pids[event.trial], signal.SIGKILL)

    on_ctrl_c = signal.getsignal(signal.SIGINT)
    outcome = run_sweep(sweep, on_event=listen)
    assert signal.getsignal(signal.SIGINT) is on_ctrl_c, "Ray Tune leaves a handler of its own behind"

    assert sorted(result.trial for result in outcome.results) == sorted(good)
    # Its process died, so it was started again; an error that would come again is not tried again.
    assert len(killed) == 1
    assert [event.trial for event in received if isinstance(event, events.TrialRestarted)] == killed
    assert list(outcome.failed) == [bad] and "queried in another order" in outcome.failed[bad]
    assert charged(outcome.folder) == {**dict.fromkeys(good, 96), bad: 0}  # it had an account before it was looked at
    for result in outcome.results:
        assert result.queries_charged == 96 and result.status == "finished"
        (log,) = result.query_log.values()
        assert log.images == log.sampled == sum(log.classes) == 96
        assert [rung.queries for rung in result.rungs] == [48, 96]
        assert [rung.queries for rung in result.stolen_nulls] == [48, 96]
        assert [actual.tried_on for actual in result.detections] == ["substitute", "null_model"]
        tried = [(r.removal["name"], r.tried_on) for r in result.removals]
        assert tried == [(name, on) for name in ("pruning", "quantisation") for on in ("substitute", "null_model")]
        assert result.removals[0].before == result.rungs[-1].report and result.removals[0].removal["rate"] == 0.5
        assert result.rungs[0].report.p_value is not None and result.victim_report.wsr is not None
    # Victim and null model were trained once, and what happened was told in order.
    assert len([event for event in received if isinstance(event, events.ModelEpoch)]) == 2
    for name in good:
        messages = [type(event).__name__ for event in received if getattr(event, "trial", None) == name]
        assert messages[0] == "TrialStarted" and messages[-1] == "TrialFinished" and messages.count("RungFinished") == 2
        after = [(e.what, e.tried_on) for e in received if isinstance(e, events.Tried) and e.trial == name]
        assert after[:2] == 2 * [("theft", "null_model")] and after[2:6] == tried and len(after) == 8
    with pytest.raises(ConfigError, match="--resume"):
        run_sweep(sweep)


def test_a_killed_driver_is_resumed_without_repeating_anything(tmp_path: Path, ray_session: None) -> None:
    # Three trials, so that some are left when the first has finished. Each thief has two accounts.
    sweep = quick(tiny_sweep(tmp_path, accounts=2))
    write_yaml(sweep, tmp_path / "sweep.yaml")
    folder = tmp_path / "s"
    driver = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "sweep_driver.py"), str(tmp_path / "sweep.yaml")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_ADDRESS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not list((folder / "results").glob("[!.]*.json")):
            assert driver.poll() is None, driver.stdout and driver.stdout.read()
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.communicate()
    finished = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "results").glob("[!.]*.json")}
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts").glob("*/*/info.json")}
    assert 1 <= len(finished) < 3 and len(models) == 2

    outcome = run_sweep(sweep, resume=True)

    names = {trial.name for trial in plan(sweep).trials}
    assert {result.trial for result in outcome.results} == names and not outcome.failed
    for path, (content, stamp) in finished.items():
        assert path.read_bytes() == content and path.stat().st_mtime_ns == stamp
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert charged(folder) == {f"{name}-{number}": 48 for name in names for number in (1, 2)}
    for result in outcome.results:
        assert result.queries_charged == 96
        assert set(result.query_log) == {f"{result.trial}-1", f"{result.trial}-2"}
        # What all processes took with them when they were killed at once may be missing for the one that ran then.
        assert all(48 - 16 <= log.images <= 48 for log in result.query_log.values())
    assert sum(log.images == 48 for result in outcome.results for log in result.query_log.values()) >= 4
    # Nothing is left to do, so that not even the models are looked at.
    received: list[events.Event] = []
    assert len(run_sweep(sweep, resume=True, on_event=received.append).results) == 3
    assert [type(event).__name__ for event in received] == ["SweepStarted"]


def test_an_impossible_trial_is_refused_before_anything_is_trained(tmp_path: Path, ray_session: None) -> None:
    sweep = tiny_sweep(tmp_path, space={"thief.budgets": {"grid": [[48], [10**6]]}})
    with pytest.raises(ConfigError, match=r"thief.budgets=\[1000000\]"):
        run_sweep(sweep)
    assert list(tmp_path.iterdir()) == []  # no folder is left that would ask for --resume


def test_optuna_and_asha_run_and_resume_to_the_number_of_samples(tmp_path: Path, ray_session: None) -> None:
    more: dict[str, Any] = {
        "space": {"thief.training.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        "search": {
            "name": "optuna",
            "samples": 1,
            "metric": ["accuracy", "victim_gap"],
            "mode": ["max", "min"],
            "constraints": {"victim_gap": 0.5},
        },
        "scheduler": {"name": "asha", "grace_rungs": 1, "reduction_factor": 2},
    }
    first = run_sweep(quick(tiny_sweep(tmp_path, **more))).results
    assert len(first) == 1 and all(result.rungs for result in first)
    assert all(result.status == ("finished" if len(result.rungs) == 2 else "stopped") for result in first)
    more["search"]["samples"] = 2
    received: list[events.Event] = []
    second = run_sweep(quick(tiny_sweep(tmp_path, **more)), resume=True, on_event=received.append).results
    assert len(second) == 2
    assert {result.trial for result in first} < {result.trial for result in second}
    assert len([event for event in received if isinstance(event, events.TrialStarted)]) == 1
