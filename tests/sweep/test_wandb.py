"""W&B in a large sweep: an owner on each node, groups, rate, offline runs collected and sent by one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_wandb import FakeWandb
from report_results import trial

from mea_ray.cli import main as cli
from mea_ray.cli.options import FAILED, OK
from mea_ray.cli.sync import CHUNK, SILENT_S, send, unsent
from mea_ray.config import TrackingConfig
from mea_ray.storage import remote as storage_module
from mea_ray.sweep import events
from mea_ray.sweep import wandb_nodes as module
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.wandb_nodes import NodeWandb, WandbOwner
from mea_ray.tracking.wandb_tracker import LIVE, WandbTracker, run_id


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return filled(SweepFolder(str(tmp_path), "s"))


def filled(folder: SweepFolder) -> SweepFolder:
    for seed in range(3):
        trial(f"t{seed}", seed=seed).save(folder.result_path(f"t{seed}"))
    (folder.path / "plan.json").write_text("{}")
    return folder


def test_runs_are_grouped_by_victim_seed_or_setting_and_carry_all_three(wandb: FakeWandb, tmp_path: Path) -> None:  # noqa: F811
    result = trial("t", seed=4)
    expected = {"victim": "victim-0123456789abcdef", "seed": "seed-4", "setting": "thief.model.name=vgg_like"}
    for group in ("victim", "seed", "setting"):
        WandbTracker(tmp_path / group, "sweep", group=group, log_models=False).log(result, {})
        arguments = wandb.runs[-1].arguments
        assert arguments["group"] == expected[group]
        assert arguments["config"]["group"] == expected
        assert arguments["tags"] == ["sweep", "seed-4"]


def test_online_runs_are_started_at_a_bounded_rate_and_offline_ones_at_once(
    wandb: FakeWandb,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    online = WandbTracker(tmp_path, "sweep", mode="online", log_models=False, runs_per_minute=30)
    for name in "abc":
        online.log(trial(name), {})
    assert slept == [0.0, 2.0, 2.0]
    WandbTracker(tmp_path, "sweep", log_models=False, runs_per_minute=30).log(trial("d"), {})
    assert len(slept) == 3 and len(wandb.runs) == 4


def test_an_owner_logs_what_is_there_once_and_tells_what_went_wrong(wandb: FakeWandb, folder: SweepFolder) -> None:  # noqa: F811
    owner = WandbOwner(folder, TrackingConfig(), {"name": "s"}, "mea-ray sweep s")
    assert owner.log("none") == [] and owner.log("t0") == [] and len(wandb.runs) == 1
    wandb.fails = "log"
    (messages,) = owner.log("t1")
    assert "disk full" in messages
    wandb.fails = ""
    again = WandbOwner(folder, TrackingConfig(), {"name": "s"}, "mea-ray sweep s")
    assert again.log("t0") == again.log("t1") == again.summarize() == []
    names = [f"model=vgg_like, seed={seed}" for seed in (0, 1, 1)]
    assert [run.arguments["name"] for run in wandb.runs] == [*names, "summary-s"]


def test_one_process_owns_wandb_and_its_death_costs_nothing(
    folder: SweepFolder, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    class Recorder(WandbOwner):
        """Notes in a file who logged what, and from which process; the second of its trials kills it, once."""

        def __init__(self, folder: SweepFolder, config: TrackingConfig, sweep: Any, command: str) -> None:
            self.notes = folder.path / "notes"

        def log(self, trial: str) -> list[str]:
            with self.notes.open("a") as file:
                file.write(json.dumps([trial, os.getpid()]) + "\n")
            if trial == "t1" and self.notes.read_text().count("t1") == 1:
                os._exit(1)
            return [f"late: {trial}"] if trial == "t2" else []

        def summarize(self) -> list[str]:
            return self.log("summary")

    monkeypatch.setattr(module, "WandbOwner", Recorder)
    warned: list[str] = []
    node = NodeWandb(folder, TrackingConfig(live=False), warned.append)
    node.attach(ray)
    try:
        for name in ("t0", "t1", "t2"):
            here = ray.get_runtime_context().get_node_id()
            node.follow(events.TrialStarted(name, {}, 1, here, (1,), 0))
            node.log(trial(name), {})
        node.summarize(folder.results())
        assert len(node._owners) == 1
    finally:
        node.detach()
    notes = [json.loads(line) for line in (folder.path / "notes").read_text().splitlines()]
    assert {name for name, _ in notes} == {"t0", "t1", "t2", "summary"}
    assert len({pid for _, pid in notes}) == 2 and os.getpid() not in {pid for _, pid in notes}
    assert warned == ["late: t2"]
    node.log(trial("t9"), {})  # after Ray has gone it is left to the next --resume
    assert not (folder.path / "wandb").exists()


def offline(folder: SweepFolder, name: str, sent: bool = False) -> Path:
    run = folder.path / "wandb" / f"offline-run-{name}"
    run.mkdir(parents=True)
    (run / f"run-{name}.wandb").write_text("x")
    if sent:
        (run / f"run-{name}.wandb.synced").write_text("x")
    return run


def fake_sync(runs: Sequence[Path]) -> bool:
    for run in runs:
        (run / f"{next(run.glob('*.wandb')).name}.synced").write_text("x")
    return True


def test_offline_runs_are_sent_once_at_a_bounded_rate(folder: SweepFolder) -> None:
    offline(folder, "old", sent=True)
    for number in range(CHUNK + 5):
        offline(folder, f"{number:03d}")
    slept: list[float] = []
    messages: list[str] = []
    assert not send(folder, messages.append, per_minute=60, sync=fake_sync, sleep=slept.append)
    assert messages[0] == f"{CHUNK + 5} runs to upload" and messages[-1] == f"{CHUNK + 5} of {CHUNK + 5} uploaded"
    assert len(slept) == 1 and CHUNK - 2 < slept[0] <= CHUNK
    assert unsent(folder) == []
    offline(folder, "new")
    assert send(folder, messages.append, sync=lambda runs: False) and len(unsent(folder)) == 1


def test_runs_of_all_nodes_meet_at_a_remote_storage(
    wandb: FakeWandb,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pyarrow import fs

    bucket = tmp_path / "bucket"
    monkeypatch.setattr(storage_module, "_remote", lambda location: (fs.LocalFileSystem(), str(bucket)))

    def on(node: str) -> SweepFolder:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / node))
        return SweepFolder("s3://bucket", "s")

    for node, name in (("one", "t0"), ("two", "t1")):
        here = filled(on(node))
        here.push("plan.json")
        here.push("results")
        run = offline(here, name)
        init = wandb.init

        def start(run: Path = run, init: Any = init, **arguments: Any) -> Any:
            started = init(**arguments)
            started.dir = str(run / "files")
            return started

        monkeypatch.setattr(wandb, "init", start)
        owner = WandbOwner(here, TrackingConfig(), {}, "")
        assert owner.log(name) == []
        monkeypatch.setattr(wandb, "init", init)
    # Another node logs neither again.
    owner = WandbOwner(on("three"), TrackingConfig(), {}, "")
    assert owner.log("t0") == owner.log("t1") == [] and len(wandb.runs) == 2
    laptop = on("laptop")
    assert [run.name for run in unsent(laptop)] == ["offline-run-t0", "offline-run-t1"]
    assert not send(laptop, lambda text: None, sync=fake_sync)
    assert unsent(on("elsewhere")) == []


@pytest.mark.parametrize(("returned", "code"), [(0, OK), (1, FAILED)])
def test_the_command_sends_with_wandb_itself(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, returned: int, code: int
) -> None:
    queried: list[list[str]] = []

    def run(command: list[str], check: bool) -> Any:
        queried.append(command)
        return SimpleNamespace(returncode=returned)

    monkeypatch.setattr(subprocess, "run", run)
    path = offline(folder, "a")
    assert cli.main(["sync", str(folder.path)]) == code
    assert queried == [[sys.executable, "-m", "wandb", "sync", str(path)]]


def begun(folder: SweepFolder, name: str) -> SweepFolder:
    """Write what a trial leaves when it begins."""
    journal = folder.trial(name)
    journal.folder.mkdir(parents=True)
    result = trial(name)
    journal.save_point(result.point)
    (journal.folder / "config.yaml").write_text(json.dumps(result.config))
    return folder


def test_a_trials_run_is_live_and_is_finished_by_its_result(wandb: FakeWandb, folder: SweepFolder) -> None:  # noqa: F811
    owner = WandbOwner(begun(folder, "t0"), TrackingConfig(), {}, "mea-ray sweep s")
    assert owner.begin("t0", "v") == []
    (run,) = wandb.runs
    assert run.arguments["name"] == "model=vgg_like, seed=0" and run.arguments["config"]["command"] == "mea-ray sweep s"
    assert owner.progress("t0", {"queries": 40}) == owner.progress("t0", {"substitute_loss": 0.5}) == []
    assert owner.progress("unknown", {"queries": 1}) == []
    assert run.logged == [{"live/queries": 40}, {"live/substitute_loss": 0.5}]
    assert owner.log("t0") == [] and run.finished
    assert run.steps[:2] == [0, 1] and run.steps[2] == 1_000_000 and "wsr" in run.logged[2]
    assert owner.begin("t0", "v") == [] and len(wandb.runs) == 1, "a trial that is logged is not begun again"


def test_a_trial_that_fails_or_whose_process_was_killed_adds_nothing_twice(
    wandb: FakeWandb,  # noqa: F811
    folder: SweepFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x")
    config = TrackingConfig(wandb="online", log_models=False)
    first = WandbOwner(begun(folder, "t0"), config, {}, "")
    first.begin("t0", "v")
    first.progress("t0", {"queries": 40})
    again = WandbOwner(folder, config, {}, "")  # the first one was killed
    again.begin("t0", "v")
    again.progress("t0", {"queries": 80})
    (run,) = wandb.runs
    assert [numbers["live/queries"] for numbers in run.logged] == [40, 80]
    assert again.end("t0") == [] and run.finished
    assert again.log("t0") == []
    final = [step for step in run.steps if step >= 1_000_000]
    (folder.path / "wandb" / "logged" / "trial-t0").unlink()  # killed before it noted so
    third = WandbOwner(folder, config, {}, "")
    assert third.begin("t0", "v") == third.log("t0") == [] and len(wandb.runs) == 1
    assert [step for step in run.steps if step >= 1_000_000] == final


def test_the_driver_passes_on_what_a_trial_does_while_it_works(folder: SweepFolder, ray_session: None) -> None:
    import ray

    warned: list[str] = []
    node = NodeWandb(begun(begun(folder, "t0"), "t1"), TrackingConfig(log_models=False), warned.append)
    node.attach(ray)
    here = ray.get_runtime_context().get_node_id()
    try:
        node.follow(events.ModelEpoch("victim", "v", 1, 2, {"loss": 2.0}))
        for name in ("t0", "t1"):
            node.follow(events.TrialStarted(name, {}, 1, here, (50, 100), 0, "v"))
        node.follow(events.ModelEpoch("victim", "v", 2, 2, {"loss": 1.0}))
        node.follow(events.Queried("t0", 40, 100))
        node.follow(events.Phase("t0", "substitute", 1, 2))
        node.follow(events.SubstituteEpoch("t0", 1, 5, 0.7))
        node.follow(events.TrialFailed("t1", "no"))
        node.log(trial("t0"), {})
        node.summarize(folder.results())
    finally:
        node.detach()
    assert warned == []
    runs = {path.name.rpartition("-")[2]: path for path in (folder.path / "wandb").glob("offline-run-*")}
    assert set(runs) == {run_id("s", name) for name in ("t0", "t1", "summary-s")}
    assert not any((path / LIVE).exists() for path in runs.values())
    content = next(runs[run_id("s", "t0")].glob("*.wandb")).read_bytes()
    for word in (b"live/victim_loss", b"live/substitute_loss", b"substitute 1/2", b"live/queries"):
        assert word in content, word


def test_a_run_that_is_being_written_is_not_sent_until_it_falls_silent(folder: SweepFolder) -> None:
    run = offline(folder, "0")
    (run / LIVE).touch()
    assert unsent(folder) == []
    long_ago = time.time() - SILENT_S - 1
    os.utime(run / LIVE, (long_ago, long_ago))
    assert unsent(folder) == [run]
