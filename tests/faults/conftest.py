"""Fixtures of the fault tests. Each sweep runs in a process of its own, so that this one needs no Ray."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[harness.Nodes]:
    """A head and workers, for one test after the other."""
    made = harness.Nodes()
    yield made
    made.close()


@pytest.fixture
def nodes(cluster: harness.Nodes) -> harness.Nodes:
    """Three raylets, whatever the test before did to them."""
    while len(cluster.workers) < 2:
        cluster.add()
    return cluster


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the sweep of the fault tests gives on one node when nothing happens."""
    storage = tmp_path_factory.mktemp("undisturbed")
    with harness.driver(harness.sweep(storage)) as run:
        assert run.ends() == 0, run.story()
    collected: dict[str, str] = harness.metrics(storage / "s")
    assert len(collected) == 3
    return collected
