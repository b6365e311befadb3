"""The batch script under a real Slurm: two nodes on this machine, one small sweep, stopped once by Slurm's signal."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import CPUS, GPUS, missing, slurm, wait_for

from mea_ray.results.records import TrialResult

ROOT = Path(__file__).parents[2]
SMALL = (
    "data.image_size=8",
    "victim.model.width=0.1",
    "thief.model.width=0.1",
    "victim.training.epochs=1",
    "thief.training.epochs=1",
    "thief.budgets=[20]",
    "verification.samples=20",
    "space={}",  # one trial
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm here (apt-get install slurm-wlm): {', '.join(missing())}"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: sockets of munge and Ray have names of 107 bytes at most."""
    path = Path(tempfile.mkdtemp(prefix="mr"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def using(path: Path) -> list[str]:
    """Command lines of processes that name a path."""
    collected = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(path) in line and "slurm" not in line and "munge" not in line:
            collected.append(line)
    return collected


def ask(env: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True, cwd=ROOT, timeout=60).stdout


def test_a_job_is_stopped_before_its_limit_and_finishes_when_it_is_started_again(folder: Path) -> None:
    bin_, log, storage, scratch = (folder / name for name in ("bin", "job.log", "storage", "r"))
    bin_.mkdir()
    uploads = folder / "uploads"
    (bin_ / "wandb").write_text(f'#!/bin/sh\nprintf "%s\\n" "$WANDB_MODE" "$@" >> {uploads}\n', encoding="utf-8")
    (bin_ / "wandb").chmod(0o755)
    with slurm(folder / "slurm") as env:
        env |= {
            "MEA_RAY_STORAGE": str(storage),
            "MEA_RAY_TMP": str(scratch),
            "MEA_RAY_WANDB_SYNC": "1",
            "PATH": f"{bin_}:{env['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_worker_niceness": "0",
        }
        options = ["--parsable", f"--cpus-per-task={CPUS}", "--mem=1500", f"--gpus-per-node={GPUS}", f"--output={log}"]
        job = ask(env, "sbatch", *options, "cluster/slurm.sh", "sweeps/quickstart.yaml", *SMALL).strip()

        def printed(text: str) -> bool:
            return log.exists() and text in log.read_text(encoding="utf-8")

        try:
            wait_for(lambda: printed("is ready"), 1200)  # the victim is trained
            ask(env, "scancel", "--batch", "--signal=USR1", job)
            wait_for(lambda: printed("back into the queue"), 400)
            assert not list(storage.glob("quickstart/results/*.json"))
            wait_for(lambda: "Restarts=1" in ask(env, "scontrol", "show", "job", job), 60)
            # Slurm lets a job that was put back wait for two minutes.
            start = time.monotonic()
            while "JobState=PENDING" in ask(env, "scontrol", "show", "job", job) and time.monotonic() - start < 200:
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=env, check=False)
                time.sleep(2)
            wait_for(lambda: "COMPLETED" in ask(env, "scontrol", "show", "job", job), 1200)
        finally:
            print(log.read_text(encoding="utf-8") if log.exists() else "the job wrote nothing")
            subprocess.run(["scancel", job], env=env, check=False, capture_output=True)
        assert "ExitCode=0:0" in ask(env, "scontrol", "show", "job", job)
        left = using(scratch)

    text = log.read_text(encoding="utf-8")
    assert text.count(f"2 nodes, {2 * CPUS} CPUs, {2 * GPUS} GPUs") == 2, "each start has both nodes, and their GPUs"
    results = [TrialResult.load(path) for path in storage.glob("quickstart/results/*.json")]
    assert len(results) == 1
    assert len(list(storage.glob("artifacts/victims/*"))) == 1, "the second start took the first one's victim"
    assert not left and not list(scratch.iterdir()), "Ray and its files are gone from the nodes"
    mode, verb, *runs = uploads.read_text(encoding="utf-8").splitlines()
    assert (mode, verb) == ("", "sync") and runs and all(Path(run).is_dir() for run in runs)
