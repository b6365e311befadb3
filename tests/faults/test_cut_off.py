"""A node that is cut off from the others, in a network namespace of its own, while it goes on working."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import psutil
import pytest

HERE, THERE = "10.231.77.1", "10.231.77.2"
# How soon the head gives a silent node up; Ray's own numbers would make it a matter of minutes.
PATIENCE = {"health_check_period_ms": 2000, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 3}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def _namespace(name: str) -> Iterator[str]:
    """A network namespace that is joined with this one by one cable, whose end here is ``<name>h``."""
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {error}")
    try:
        _ip("link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}w", "netns", name)
        _ip("addr", "add", f"{HERE}/24", "dev", f"{name}h")
        _ip("link", "set", f"{name}h", "up")
        _ip("-n", name, "addr", "add", f"{THERE}/24", "dev", f"{name}w")
        _ip("-n", name, "link", "set", f"{name}w", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        subprocess.run(["ip", "link", "del", f"{name}h"], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextmanager
def _node_in(namespace: str, nodes: harness.Nodes, log: Path) -> Iterator[int]:
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    command += [f"--address={nodes.cluster.address}", f"--node-ip-address={THERE}", "--num-cpus=2"]
    command += [f"--object-store-memory={harness.OBJECT_STORE}", "--disable-usage-stats"]
    root = str(Path(__file__).parents[2])
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": root})
    try:
        deadline = time.monotonic() + 120
        while len(nodes.cluster.global_state._live_node_ids()) < 3:  # type: ignore[no-untyped-call]
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield process.pid
    finally:
        left: list[Any] = (
            [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        )
        for each in left:
            harness.with_suppressed(each.kill)
        process.wait(30)


@pytest.mark.slow
def test_a_node_that_is_cut_off_costs_what_it_had_under_way(undisturbed: dict[str, str], tmp_path: Path) -> None:
    with _namespace(f"mr{os.getpid() % 100000}") as cable:
        nodes = harness.Nodes(workers=0, node_ip_address=HERE, _system_config=PATIENCE)
        try:
            near = nodes.cluster.add_node(num_cpus=2, object_store_memory=harness.OBJECT_STORE, node_ip_address=HERE)
            nodes.workers.append(near)
            with _node_in(cable, nodes, tmp_path / "node.log"):
                config = harness.sweep(tmp_path)
                with harness.driver(config, "--address", nodes.cluster.address, env=nodes.env) as run:
                    run.until(harness.kind("TrialStarted"), count=2)
                    run.until(harness.kind("Queried"))
                    _ip("link", "set", f"{cable}h", "down")
                    assert run.ends() == 0, run.story()
        finally:
            nodes.close()
    assert harness.metrics(tmp_path / "s") == undisturbed, run.story()
    assert harness.charged(tmp_path / "s") == dict.fromkeys(undisturbed, 96)
    assert len(run.of("ModelEpoch")) == 2 and not run.of("TrialFailed")
    print(*[event.get("reason") or event.get("message") for event in run.of("TrialRestarted", "Warned")], sep="\n  ")
    assert run.of("TrialRestarted", "Warned"), "the user is told"
