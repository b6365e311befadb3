from __future__ import annotations

import pytest

from mea_ray.bench.storage import bench_storage
from mea_ray.core.errors import ConfigError


def test_a_trial_costs_a_request_a_file_and_its_driver_a_handful() -> None:
    messages: list[str] = []
    result = bench_storage(removals=2, budgets=2, chunks=3, on_progress=messages.append)
    files = 2 + 3 + 2 * (2 + 1) + 2 + 1 + 1  # config and point, answers, rungs, removals, the result so far, the result
    assert result["files"] == files
    # One list of what another process left, one put a file, and the result so far is written at each rung.
    assert result["requests"] == 1 + files + 1 and result["by_method"] == {"GET": 1, "PUT": files + 1}
    assert result["driver_requests"] <= 3 and result["driver_bytes"] < 2000, "the driver fetches the result alone"
    assert result["bytes_sent"] > 3 * 256 * 10 * 4
    assert len(messages) == 4


def test_a_trial_has_at_least_one_of_each() -> None:
    with pytest.raises(ConfigError, match="chunks=0"):
        bench_storage(chunks=0)
