"""A sweep on an object store, on nodes that share nothing else: each has a cache of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest

from mea_ray.bench.object_store import CREDENTIALS, LoopbackS3
from mea_ray.storage import remote
from mea_ray.storage.remote import Storage

pytestmark = pytest.mark.slow


class Apart(harness.Nodes):
    """A head and workers with a cache each."""

    def __init__(self, caches: Path) -> None:
        self.caches = caches
        super().__init__(env_vars=self._cache("head"))

    def _cache(self, name: str) -> dict[str, str]:
        return {**CREDENTIALS, "XDG_CACHE_HOME": str(self.caches / name)}

    def add(self) -> Any:
        """Add a worker."""
        env = self._cache(f"worker-{len(self.workers)}")
        node = self.cluster.add_node(num_cpus=self.cpus, object_store_memory=harness.OBJECT_STORE, env_vars=env)
        self.workers.append(node)
        return node

    @property
    def env(self) -> dict[str, str]:
        """What a driver on the head needs."""
        return {**super().env, **self._cache("head")}


@pytest.fixture
def nodes(s3: LoopbackS3, tmp_path: Path) -> Iterator[Apart]:
    made = Apart(tmp_path / "caches")
    yield made
    made.close()


def _seen_from_elsewhere(location: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """What the storage itself holds of the sweep, on a machine that took no part."""
    monkeypatch.setattr(remote, "_cache_root", lambda: cache)
    storage = Storage(location)
    storage.pull_folder("s")
    return storage.root / "s"


def test_killed_and_resumed_it_gives_what_a_local_sweep_gives(
    s3: LoopbackS3, nodes: Apart, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = s3.location("killed")
    config = harness.sweep(location, base__resources__trial__cpus=1.25)
    address = ("--address", nodes.cluster.address)
    with harness.driver(config, *address, env=nodes.env) as first:
        first.until(harness.kind("TrialFinished"))
        first.until(harness.kind("Queried"), count=2)
        first.kill()
    with harness.driver(config, "--resume", *address, env=nodes.env) as second:
        assert second.ends() == 0, second.story()
    there = _seen_from_elsewhere(location, monkeypatch, tmp_path / "elsewhere")
    assert not harness.differences(harness.metrics(there), undisturbed), second.story()
    assert harness.charged(there) == dict.fromkeys(undisturbed, 96)
    assert not second.of("ModelEpoch", "TrialFailed")
    on_nodes = {path.relative_to(nodes.caches).parts[0] for path in nodes.caches.glob("*/mea_ray/*/s/trials/*")}
    assert len(on_nodes - {"head"}) >= 1
    on_head = [path.name for path in (nodes.caches / "head").glob("mea_ray/*/s/trials/*/*")]
    assert "substitutes" not in on_head and "transfer" not in on_head, "the head fetches what it shows"


def test_a_head_that_lost_its_cache_charges_every_answer(
    s3: LoopbackS3, nodes: Apart, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = s3.location("lost")
    config = harness.sweep(location)
    address = ("--address", nodes.cluster.address)
    with harness.driver(config, *address, env=nodes.env) as first:
        first.until(lambda event: event["event"] == "RungFinished" and event["budget"] == 48)
        first.kill()
    shutil.rmtree(nodes.caches / "head")
    with harness.driver(config, "--resume", *address, env=nodes.env) as second:
        assert second.ends() == 0, second.story()
    there = _seen_from_elsewhere(location, monkeypatch, tmp_path / "elsewhere")
    assert not harness.differences(harness.metrics(there), undisturbed), second.story()
    assert harness.charged(there) == dict.fromkeys(undisturbed, 96)
    assert any("ledger of its service was lost" in event["message"] for event in second.of("Warned")), second.story()
