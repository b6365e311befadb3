"""The promise of the cluster: a disturbed sweep on three nodes ends with the results of a quiet one on one node."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import harness
import pytest

OPTIONS: dict[str, Any] = {
    "space": {"seed": {"grid": list(range(12))}, "thief.attack": {"grid": ["distillation", "knockoff"]}},
    "per_second": 48,
    "base__service__replicas": 2,
    "base__resources__placement": "spread",
}


def quiet(storage: Path) -> float:
    """Run the sweep on one node where nothing happens; return the seconds."""
    nodes = harness.Nodes(workers=1, cpus=4)
    try:
        began = time.perf_counter()
        config = harness.sweep(storage, **OPTIONS)
        with harness.driver(config, "--address", nodes.cluster.address, env=nodes.env) as run:
            assert run.ends() == 0, run.story()
        return time.perf_counter() - began
    finally:
        nodes.close()


def disturbed(storage: Path) -> tuple[float, harness.Driver]:
    """Run it on three, kill a worker's node after a quarter of the trials and a replica after half of them."""
    nodes = harness.Nodes(cpus=3)
    try:
        began = time.perf_counter()
        config = harness.sweep(storage, **OPTIONS)
        with harness.driver(config, "--address", nodes.cluster.address, env=nodes.env) as run:
            run.until(harness.kind("TrialFinished"), count=6)
            run.until(harness.kind("Queried"), count=len(run.of("Queried")) + 1)
            (lost, _), (remaining, replica), *_ = [
                result for result in nodes.where("Replica") if result[0] in nodes.workers
            ]
            assert lost is not remaining, "one replica on each worker"
            nodes.remove(lost)
            run.until(harness.kind("TrialFinished"), count=12)
            replica.kill()
            assert run.ends() == 0, run.story()
        return time.perf_counter() - began, run
    finally:
        nodes.close()


def compare(one: Path, three: Path, run: harness.Driver) -> None:
    """Hold the disturbed sweep against the quiet one."""
    expected = harness.metrics(one / "s")
    started = [(event["trial"], event["rungs_done"]) for event in run.of("TrialStarted")]
    messages = [event["reason"] for event in run.of("TrialRestarted")] + [e["message"] for e in run.of("Warned")]
    again = [start for place, start in enumerate(started) if start[0] in [trial for trial, _ in started[:place]]]
    print(f"started again, with rungs kept: {again}; said:", *messages, sep="\n  ")
    assert len(expected) == 24
    assert harness.metrics(three / "s") == expected, run.story()
    assert harness.charged(three / "s") == harness.charged(one / "s") == dict.fromkeys(expected, 96)
    # A trial is started again if it was on the node that was lost, or made way for a replica; nothing finished is.
    assert sorted(event["trial"] for event in run.of("TrialFinished")) == sorted(expected)
    assert len(started) - 24 <= len(run.of("TrialRestarted", "TrialMadeWay")) and not run.of("TrialFailed")
    order = [(event["event"], event["trial"]) for event in run.of("TrialStarted", "TrialFinished")]
    assert not [t for t in expected if ("TrialStarted", t) in order[order.index(("TrialFinished", t)) :]]
    # What a trial finds done when it goes on is every rung that it had finished.
    done: dict[str, int] = dict.fromkeys(expected, 0)
    for event in run.received:
        if event["event"] == "RungFinished" and event["queries"] > 48 * done[event["trial"]]:
            done[event["trial"]] += 1
        elif event["event"] == "TrialStarted":
            assert event["rungs_done"] >= done[event["trial"]], event
    assert len(run.of("ModelEpoch")) == 2


@pytest.mark.slow
def test_a_node_and_a_replica_killed_in_the_middle_change_no_result(tmp_path: Path) -> None:
    alone = quiet(tmp_path / "one")
    seconds, run = disturbed(tmp_path / "three")
    print(f"on one node {alone:.0f} s, on three and disturbed {seconds:.0f} s")
    compare(tmp_path / "one", tmp_path / "three", run)
