"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from fake_wandb import FakeWandb
from hypothesis import settings

from mea_ray.bench.object_store import CREDENTIALS, LoopbackS3

settings.register_profile("no deadline", deadline=None)  # a busy machine is slow now and then, which is no fault
settings.load_profile("no deadline")

# Ray runs its workers at nice 15: on a machine that is busy with something else they would hardly run at all.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small Ray for the whole run; starting one per test would cost more than the tests."""
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300 * 1024**2,
        ignore_reinit_error=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the tracker sets
    return fake


@pytest.fixture(scope="module")
def s3() -> Iterator[LoopbackS3]:
    """An S3 server on this machine, with its credentials in the environment."""
    patch = pytest.MonkeyPatch()
    for name, value in CREDENTIALS.items():
        patch.setenv(name, value)
    with LoopbackS3() as server:
        yield server
    patch.undo()
