"""A sweep on three raylets loses nothing and repeats nothing finished, whatever dies; and the user is told once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import harness
import pytest

pytestmark = pytest.mark.slow


def _on_workers(nodes: harness.Nodes, name: str) -> list[Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        result = [(node, process) for node, process in nodes.where(name) if node in nodes.workers]
        if result:
            return result
        time.sleep(0.2)
    raise AssertionError(f"no process of {name} on a worker")


def _kill(*names: str) -> Any:
    def fault(nodes: harness.Nodes, run: harness.Driver) -> None:
        result = [nodes.where(name)[0][1] for name in names]
        for process in result:  # at once: none of them is back when the next one dies
            process.kill()

    return fault


def _kill_trial(nodes: harness.Nodes, run: harness.Driver) -> None:
    os.kill(run.of("TrialStarted")[0]["pid"], signal.SIGKILL)


def _terminate_trial(nodes: harness.Nodes, run: harness.Driver) -> None:
    os.kill(run.of("TrialStarted")[0]["pid"], signal.SIGTERM)


def _lose_a_node(nodes: harness.Nodes, run: harness.Driver) -> None:
    """Kill the node of the service. Trials hold all of the other one, and have to make way for the service there."""
    (node, _), *_ = _on_workers(nodes, "Replica")
    nodes.remove(node)


def _notice_to_a_node(nodes: harness.Nodes, run: harness.Driver) -> None:
    (node, _), *_ = _on_workers(nodes, "Replica")
    nodes.remove(node, notice=True)


# What is done, and what the user must be told of it, as a part of exactly one line for each thing that died.
FAULTS = {
    "replica": (_kill("Replica"), "replica 0 died and is up again"),
    "ledger": (_kill("LedgerActor"), "the ledger died and is up again"),
    "broker": (_kill("Broker"), "going on"),
    "broker-and-replica": (_kill("Broker", "Replica"), "going on"),
    "broker-and-ledger": (_kill("Broker", "LedgerActor"), "going on"),
    "trial": (_kill_trial, "going on"),
    "trial-sigterm": (_terminate_trial, "going on"),
    "node": (_lose_a_node, "up again"),
    "node-sigterm": (_notice_to_a_node, "up again"),
}


def _messages(run: harness.Driver) -> list[str]:
    restarted = [f"{event['trial']} going on: {event['reason']}" for event in run.of("TrialRestarted")]
    return [*restarted, *(event["message"] for event in run.of("Warned"))]


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(fault: str, nodes: harness.Nodes, undisturbed: dict[str, str], tmp_path: Path) -> None:
    inject, line = FAULTS[fault]
    config = harness.sweep(tmp_path)
    with harness.driver(config, "--address", nodes.cluster.address, env=nodes.env) as run:
        run.until(harness.kind("Queried"))
        inject(nodes, run)
        assert run.ends() == 0, run.story()
    assert harness.metrics(tmp_path / "s") == undisturbed, run.story()
    assert harness.charged(tmp_path / "s") == dict.fromkeys(undisturbed, 96)
    # Repeated: no training of a victim or a null model, no finished rung, no finished trial.
    assert len(run.of("ModelEpoch")) == 2 and not run.of("TrialFailed")
    rungs = [(event["trial"], event["budget"]) for event in run.of("RungFinished")]
    restarted = {event["trial"] for event in run.of("TrialRestarted")}
    assert all(rungs.count(rung) == 1 for rung in rungs if rung[0] not in restarted)
    order = [(event["event"], event["trial"]) for event in run.of("TrialStarted", "TrialFinished")]
    for trial in undisturbed:
        assert order.count(("TrialFinished", trial)) == 1
        assert ("TrialStarted", trial) not in order[order.index(("TrialFinished", trial)) :]
    messages = _messages(run)
    print(fault, *messages, sep="\n  ")
    assert sum(line in each for each in messages) >= 1, run.story()
    assert len(messages) == len(set(messages)) <= 4, "no line twice"
    # Of what died or waits there is one line; of a service's actor one that it is away and one that it is back.
    about = [each.partition(" going on")[0].partition(" has been")[0].partition(" died")[0] for each in messages]
    assert all(about.count(each) <= (1 if each in undisturbed else 2) for each in about), messages


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_driver_goes_and_resume_goes_on(
    number: signal.Signals, nodes: harness.Nodes, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    config = harness.sweep(tmp_path, base__resources__trial__cpus=1.25)
    address = ("--address", nodes.cluster.address)
    with harness.driver(config, *address, env=nodes.env) as first:
        first.until(harness.kind("TrialFinished"))
        first.until(harness.kind("Queried"), count=2)
        first.process.send_signal(number)
        code = first.ends()
    finished = harness.metrics(tmp_path / "s")
    assert 1 <= len(finished) < 3 and code != 0
    with harness.driver(config, "--resume", *address, env=nodes.env) as second:
        assert second.ends() == 0, second.story()
    assert harness.metrics(tmp_path / "s") == undisturbed
    assert harness.charged(tmp_path / "s") == dict.fromkeys(undisturbed, 96)
    assert not second.of("ModelEpoch")
    assert not {event["trial"] for event in second.of("TrialStarted")} & set(finished)
