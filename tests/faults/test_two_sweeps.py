"""Two sweeps on one cluster that has room for the services of both, but then for no trial of either."""

from __future__ import annotations

from pathlib import Path

import harness
import pytest

pytestmark = pytest.mark.slow


def test_both_finish_and_the_second_says_what_it_waits_for(tmp_path: Path) -> None:
    nodes = harness.Nodes(workers=1, cpus=2)
    try:
        address = ("--address", nodes.cluster.address)

        def config(name: str) -> object:
            one = {"base__service__cpus_per_replica": 1.0, "base__resources__trial__cpus": 1.0}
            return harness.sweep(tmp_path / name, seeds=2, per_second=24, name=name, **one)

        with (
            harness.driver(config("first"), *address, env=nodes.env) as first,  # type: ignore[arg-type]
            harness.driver(config("second"), *address, env=nodes.env) as second,  # type: ignore[arg-type]
        ):
            assert first.ends() == 0, first.story()
            assert second.ends() == 0, second.story()
    finally:
        nodes.close()
    for run in (first, second):
        assert len(run.of("TrialFinished")) == 2 and not run.of("TrialFailed"), run.story()
    said = [event["message"] for run in (first, second) for event in run.of("Warned") if "waiting" in event["message"]]
    assert any("uses the cluster" in text for text in said), said
    assert len({text.rpartition("sweep '")[2].partition("'")[0] for text in said}) == 1, "one of them waits"
