"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

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
