"""A sweep as a job of `ray job submit`, as the guide has it, on a cluster of this machine that asks for a token."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A cluster of one node."""

    dashboard: str
    address: str
    environment: dict[str, str]

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **more}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="mrj", dir="/tmp")  # the path of a socket is short
    port, dashboard = free_port(), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), "RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True, timeout=120)
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    # Of its own, too: the agent, which starts jobs, does not come up if another Ray's has its port.
    ports += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
    command = [RAY, "start", "--head", "--block", "--num-cpus=3", "--object-store-memory=100000000", *ports]
    process = subprocess.Popen(
        command,
        env={**environment, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for port_of in (port, dashboard):
            _wait_for(port_of, process)
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 240
    while time.monotonic() < until:
        assert process.poll() is None, "the head did not start"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"nothing listens at port {port}")


@pytest.mark.slow
def test_a_job_runs_a_sweep_on_its_cluster_and_tokens_are_used(head: Head, tmp_path: Path) -> None:
    model = {"name": "vgg_like", "width": 0.0625}
    base = {
        "victim": {"model": model, "training": {"epochs": 1}},
        "thief": {"model": model, "training": {"epochs": 1}, "budgets": [32]},
        "verification": {"samples": 50, "null_models": 1},
        "removal": {"methods": []},
        "tracking": {"wandb": "disabled"},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"name": "job", "base": base, "space": {}}), encoding="utf-8")
    sweep = [sys.executable, "-m", "mea_ray", "sweep", str(file), "--address", "auto", f"storage={tmp_path / 'store'}"]
    done = head.run(RAY, "job", "submit", "--address", head.dashboard, "--", *sweep, RAY_AUTH_MODE="token")
    until = time.monotonic() + 240
    while "No available agent" in done.stderr and time.monotonic() < until:  # the head has only just started
        time.sleep(5)
        done = head.run(RAY, "job", "submit", "--address", head.dashboard, "--", *sweep, RAY_AUTH_MODE="token")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    assert len(list((tmp_path / "store" / "job" / "results").glob("*.json"))) == 1

    # Another token is refused within the time that the guide promises, and in one sentence.
    began = time.monotonic()
    refused = head.run(
        *sweep[:-3], "--address", head.address, "name=other", RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_MODE="token"
    )
    assert refused.returncode == 2 and "cannot be joined" in refused.stderr, refused.stderr[-2000:]
    assert time.monotonic() - began < 240
