"""The HTTP benchmark: what it measures, and its record in the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mea_ray.bench.http import bench_http, table

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "records" / "bench_http.json"


def test_the_documentation_shows_the_record() -> None:
    result = json.loads(RECORD.read_text(encoding="utf-8"))
    assert table(result) in (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), "put the new table on the page"
    assert result["http_to_actors_256_1"] == pytest.approx(result["http_256_1"] / result["actors_256_1"])
    assert result["lone_to_bare"] == pytest.approx(result["latency_http_p50_ms"] / result["latency_bare_p50_ms"])
    assert result["versions"]["ray"]


@pytest.mark.slow
def test_ratios_are_those_of_the_speeds(ray_session: Any) -> None:
    from ray import serve

    measured = bench_http(
        shape=(1, 8, 8), request_images=(1, 8), clients=(1, 2), images=32, single_images=8, lone_images=5, repeats=1
    )
    serve.shutdown()
    for pair in ("1_1", "1_2", "8_1", "8_2"):
        assert measured[f"http_to_actors_{pair}"] == pytest.approx(
            measured[f"http_{pair}"] / measured[f"actors_{pair}"]
        )
    assert measured["fsync_ms"] >= 0 and table(measured).count("\n") == 11
