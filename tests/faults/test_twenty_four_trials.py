"""The promise of the cluster: a disturbed sweep on three nodes ends with the results of a quiet one on one node."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import harness
import pytest


@pytest.mark.slow
def test_a_node_and_a_replica_killed_in_the_middle_change_no_result(tmp_path: Path) -> None:
    axes = {"seed": {"grid": list(range(12))}, "thief.attack": {"grid": ["distillation", "knockoff"]}}
    options: dict[str, Any] = {
        "space": axes,
        "per_second": 48,
        "base__service__replicas": 2,
        "base__resources__placement": "spread",
    }
    nodes = harness.Nodes(workers=1, cpus=4)
    try:
        began = time.perf_counter()
        quiet = harness.sweep(tmp_path / "one", **options)
        with harness.driver(quiet, "--address", nodes.cluster.address, env=nodes.env) as run:
            assert run.ends(1800) == 0, run.story()
        alone = time.perf_counter() - began
    finally:
        nodes.close()
    expected = harness.metrics(tmp_path / "one" / "s")
    assert len(expected) == 24

    nodes = harness.Nodes(cpus=2.5)
    try:
        config = harness.sweep(tmp_path / "three", **options)
        began = time.perf_counter()
        with harness.driver(config, "--address", nodes.cluster.address, env=nodes.env) as run:
            run.until(harness.kind("TrialFinished"), count=6, timeout_s=1200)
            asking = len(run.of("Queried"))
            run.until(harness.kind("Queried"), count=asking + 1)
            (lost, _), (kept, replica), *_ = [found for found in nodes.where("Replica") if found[0] in nodes.workers]
            assert lost is not kept, "one replica on each worker"
            nodes.remove(lost)
            run.until(harness.kind("TrialFinished"), count=12, timeout_s=1200)
            replica.kill()
            assert run.ends(1800) == 0, run.story()
        disturbed = time.perf_counter() - began
    finally:
        nodes.close()

    told = [event["reason"] for event in run.of("TrialRestarted")] + [e["message"] for e in run.of("Warned")]
    started = [event["trial"] for event in run.of("TrialStarted")]
    finished = [event["trial"] for event in run.of("TrialFinished")]
    again = [f"{event['trial']}: {event['rungs_done']} rungs kept" for event in run.of("TrialStarted")]
    print(f"alone {alone:.0f} s, disturbed {disturbed:.0f} s; started {len(started)}", *again, *told, sep="\n")
    assert harness.metrics(tmp_path / "three" / "s") == expected, run.story()
    assert harness.charged(tmp_path / "three" / "s") == dict.fromkeys(expected, 96)
    assert harness.charged(tmp_path / "one" / "s") == dict.fromkeys(expected, 96)
    # A trial is started again only if it was under way on the node that was lost, and nothing finished is repeated.
    assert sorted(finished) == sorted(expected) and len(started) - 24 == len(run.of("TrialRestarted")) <= 3
    assert len(run.of("ModelEpoch")) == 2
