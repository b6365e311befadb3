"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


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
