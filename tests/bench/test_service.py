"""The service benchmark: it refuses what Ray cannot hold, and measures what it says."""

from __future__ import annotations

from typing import Any

import pytest

from mea_ray.bench.service import bench_service
from mea_ray.core.errors import ConfigError

TINY: dict[str, Any] = {
    "shape": (1, 8, 8),
    "images": 64,
    "single_images": 32,
    "request_images": 32,
    "clients": 4,
    "repeats": 1,
}


def test_too_small_a_ray_is_refused_at_once(ray_session: Any) -> None:
    with pytest.raises(ConfigError, match=r"3 replicas of 8 CPU each.*cpus_per_replica"):
        bench_service(**TINY, cpus_per_replica=8.0)


def test_ratios_are_those_of_the_speeds(ray_session: Any) -> None:
    measured = bench_service(**TINY, pass_images=8)
    assert measured["service_to_bare"] == pytest.approx(measured["service"] / measured["bare"])
    assert measured["merged_to_unmerged"] == pytest.approx(measured["merged"] / measured["unmerged"])
    assert measured["many_to_one"] == pytest.approx(measured["service_many"] / measured["service"])
    assert 1 / 8 <= measured["mean_fill"] <= 1
