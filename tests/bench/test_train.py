from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from mea_ray.bench.train import bench_train
from mea_ray.bench.views import bench_views
from mea_ray.core.errors import ConfigError, DataError

TINY: dict[str, Any] = {"model_params": {"width": 0.1}, "steps": 3, "rounds": 2, "batch_size": 16}


def test_measures_all_three_in_each_round() -> None:
    seen: list[dict[str, float]] = []
    bench = bench_train(shape=(1, 16, 16), **TINY, on_round=seen.append)
    assert seen == bench.rounds and len(seen) == 2
    assert all(set(speeds) == {"plain", "engine", "watermark"} and min(speeds.values()) > 0 for speeds in seen)
    assert list(seen[0]) != list(seen[1])  # the order turns
    assert bench.plain == statistics.median(speeds["plain"] for speeds in seen)
    assert bench.watermark_ratio == statistics.median(speeds["watermark"] / speeds["plain"] for speeds in seen)
    assert json.loads(json.dumps(bench.to_dict()))["settings"]["steps"] == 3


def test_takes_a_dataset_by_name() -> None:
    bench = bench_train(data="digits", **{**TINY, "rounds": 1})
    assert bench.settings["shape"] == [1, *bench.settings["shape"][1:]] and bench.watermark > 0


def test_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ConfigError, match="rounds=0"):
        bench_train(**{**TINY, "rounds": 0})
    with pytest.raises(ConfigError, match="no_such"):
        bench_train(**TINY, watermark="no_such")
    with pytest.raises(DataError, match="batch"):
        bench_train(data="digits", **{**TINY, "batch_size": 100_000, "steps": 1})


def test_views_are_measured_beside_their_pass_and_beside_torchvision() -> None:
    bench = bench_views(shape=(3, 16, 16), model_params={"width": 0.1}, batch_size=8, batches=1, rounds=2)
    assert [set(speeds) for speeds in bench.rounds] == [{"batched", "step", "per_image"}] * 2
    assert 0 < bench.share < 1 and bench.speedup > 0
    assert bench.batched == statistics.median(speeds["batched"] for speeds in bench.rounds)
    assert json.loads(json.dumps(bench.to_dict()))["settings"]["batch_size"] == 8
    with pytest.raises(ConfigError, match="3 channels"):
        bench_views(shape=(1, 16, 16))
    with pytest.raises(ConfigError, match="batches=0"):
        bench_views(batches=0)
