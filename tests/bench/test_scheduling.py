from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mea_ray.bench import scheduling as bench
from mea_ray.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "records" / "bench_scheduling.json"


@pytest.fixture(scope="module")
def simulated() -> dict[str, Any]:
    return bench.bench_scheduling(check=False)


def test_the_documentation_shows_the_record_and_the_simulation_gives_it_again(simulated: dict[str, Any]) -> None:
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    shown = bench.table(found)
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert shown in page and bench.check_line(found) in page, "put the new table on the page"
    assert bench.table(simulated) == shown
    assert found["of_ideal_64"] >= 0.85


def test_large_clusters_are_kept_busy(simulated: dict[str, Any]) -> None:
    assert simulated["of_ideal_64"] >= 0.85 and simulated["of_ideal_16"] >= 0.85
    assert simulated["hours_64"] * simulated["of_ideal_64"] == pytest.approx(simulated["ideal_hours_64"])
    assert simulated["one_service_hours_64"] > 4 * simulated["ideal_hours_64"]


def test_a_small_one_is_simulated_with_the_requested_size() -> None:
    said: list[str] = []
    found = bench.bench_scheduling(check=False, gpus=(8,), trials=40, victims=4, services=2, on_progress=said.append)
    assert found["services_8"] == 2 and found["of_ideal_8"] <= 1
    assert len(said) == 1 and said[0].startswith("8 GPUs: ")


def test_what_the_simulation_needs_is_read_from_a_timeline() -> None:
    timeline = [
        (10.0, "service", "v", 0),
        (11.0, "begun", "a", 1),
        (11.5, "begun", "b", 2),
        (15.5, "ended", "a", 0),  # 4 s of sleep, .5 beside it
        (16.0, "begun", "c", 1),  # a pause of .5
        (16.0, "ended", "b", 0),
        (20.5, "ended", "c", 0),
        (23.5, "service", "w", 0),
        (24.5, "begun", "d", 2),  # 4 s after the last trial of the other service; no pause between trials of one
        (29.0, "ended", "d", 0),
    ]
    assert bench.between_services(timeline) == 4.0
    assert bench.around_trials(timeline, 4.0) == pytest.approx(0.5 + 0.5)


def test_numbers_that_do_not_fit_are_refused() -> None:
    for wrong in ({"trials": 3, "victims": 4}, {"gpus": (1,)}, {"gpus": ()}):
        with pytest.raises(ConfigError, match="gpus="):
            bench.bench_scheduling(check=False, **wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_simulation_comes_to_the_duration_of_a_real_sweep() -> None:
    found = bench.bench_scheduling(gpus=(4,), trials=20, victims=2, check_trials=16, check_victims=4, check_s=4.0)
    assert found["failed"] == 0
    assert 0.8 <= found["simulated_by_real"] <= 1.25, found
