"""A process that is killed with SIGKILL in the middle of a training leaves a snapshot that the next one takes up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from torch import equal

from mea_ray.results.records import TrialResult

pytestmark = pytest.mark.slow

BASE: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 12},
    "victim": {
        "insecure_key_from_seed": True,
        "model": {"name": "vgg_like", "width": 0.0625},
        "watermark": {"name": "mea_defender_two_stage", "second": {"epochs": 4, "fixed_samples": 20}},
        "training": {"epochs": 4, "batch_size": 64},
    },
    "thief": {"model": {"name": "vgg_like", "width": 0.0625}, "training": {"epochs": 6}, "budgets": [900]},
    "verification": {"samples": 50},
    "service": {"cpus_per_replica": 0.2},
    "resources": {"victim": {"cpus": 1}, "trial": {"cpus": 1}, "snapshot_every_s": 0},
    "tracking": {"wandb": "disabled"},
}
WAIT_S = 1200  # for what hangs; how long a training takes is the machine's business
DRIVER = Path(__file__).parent / "driver.py"


def started(arguments: list[str], outputs: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "COLUMNS": "300"}
    with outputs.open("ab") as file:  # no pipe: what it started may outlive it for a moment, and would hold that open
        return subprocess.Popen(
            [sys.executable, *arguments], stdout=file, stderr=file, env=environment, start_new_session=True
        )


def kill_with_a_snapshot(process: subprocess.Popen[bytes], storage: Path, pattern: str) -> None:
    """Kill the process, and all that it started, as soon as there is a snapshot."""
    deadline = time.monotonic() + WAIT_S
    while not list(storage.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, "it ended without a snapshot"
        time.sleep(0.002)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.suspend()  # at once: a worker of Ray would finish its training before it misses its driver
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait(60)


def of(storage: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    (path,) = storage.glob("*/*/results/*.json") if (storage / "local").exists() else storage.glob("*/results/*.json")
    result = TrialResult.load(path)
    (victim,) = (storage / "artifacts" / "victims").glob("*/model.safetensors")
    return result.model_dump(mode="json"), load_file(victim)


def same(one: Path, other: Path) -> None:
    (first, weights), (second, others) = of(one), of(other)
    assert all(equal(value, others[name]) for name, value in weights.items())
    assert first["victim_sha256"] == second["victim_sha256"]
    stolen = [[rung["weights_sha256"] for rung in each["rungs"]] for each in (first, second)]
    assert stolen[0] == stolen[1] and first["queries_charged"] == second["queries_charged"]
    assert not list(other.rglob("*.state")), "snapshots of what is finished are removed"


def local(file: Path, storage: Path) -> list[str]:
    return ["-m", "mea_ray", "run", str(file), "--local", f"storage={storage}"]


def test_a_local_run_that_is_killed_in_each_training(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(BASE))
    alone, killed, outputs = tmp_path / "alone", tmp_path / "killed", tmp_path / "said.txt"
    assert started(local(file, alone), outputs).wait(WAIT_S) == 0, outputs.read_text()
    for pattern in (
        "artifacts/states/victims-*/0.state",
        "artifacts/states/victims-*/1.state",
        "artifacts/states/nulls-*/0.state",
        "local/*/trials/*/transfer/.training-900.state",
    ):
        kill_with_a_snapshot(started(local(file, killed), outputs), killed, pattern)
    assert started(local(file, killed), outputs).wait(WAIT_S) == 0, outputs.read_text()
    assert "continues after epoch" in outputs.read_text()
    same(alone, killed)


def test_a_sweep_whose_driver_and_workers_are_killed(tmp_path: Path) -> None:
    alone, killed, outputs = tmp_path / "alone", tmp_path / "killed", tmp_path / "said.txt"
    files = {}
    for storage in (alone, killed):
        files[storage] = tmp_path / f"{storage.name}.yaml"
        sweep = {"name": "s", "base": {**BASE, "storage": str(storage)}, "space": {"seed": {"grid": [0]}}}
        files[storage].write_text(yaml.safe_dump(sweep))
    assert started([str(DRIVER), str(files[alone])], outputs).wait(WAIT_S) == 0, outputs.read_text()
    kill_with_a_snapshot(
        started([str(DRIVER), str(files[killed])], outputs), killed, "artifacts/states/victims-*/1.state"
    )
    again = started([str(DRIVER), str(files[killed]), "--resume"], outputs)
    assert again.wait(WAIT_S) == 0, outputs.read_text()[-2000:]
    received = [json.loads(line) for line in outputs.read_text().splitlines() if line.startswith('{"event"')]
    epochs = [each for each in received if each["event"] == "ModelEpoch" and each["role"] == "victim"]
    resumed = [each for each in epochs if each["record"].get("resumed")]
    assert resumed and resumed[0]["epoch"] == resumed[0]["record"]["resumed"]
    same(alone, killed)
