from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from mea_ray.bench.stack import bench_stack
from mea_ray.core.errors import ConfigError

TINY: dict[str, Any] = {"networks": (2, 3), "model_params": {"width": 0.05}, "steps": 2, "rounds": 2, "batch_size": 8}


@pytest.mark.parametrize("seeds", ["one", "own"])
def test_both_are_measured_in_each_round_and_agree(seeds: Any) -> None:
    seen: list[dict[str, float]] = []
    bench = bench_stack(**TINY, seeds=seeds, precision="float32", on_round=seen.append)
    assert seen == bench.rounds and [each["networks"] for each in seen] == [2, 3, 2, 3]
    assert all(each["single"] > 0 and each["stacked"] > 0 for each in seen)
    for count in (2, 3):
        ratios = [each["stacked"] / each["single"] for each in seen if each["networks"] == count]
        assert bench.ratio[count] == statistics.median(ratios)
        assert 0 <= bench.difference[count] < 0.02
    figures = json.loads(json.dumps(bench.to_dict()))
    assert {"single_2", "stacked_3", "ratio_3", "difference_2"} <= set(figures)
    assert figures["settings"]["seeds"] == seeds


def test_counts_below_their_least_are_refused() -> None:
    with pytest.raises(ConfigError, match="networks=1"):
        bench_stack(**{**TINY, "networks": (1, 8)})
    with pytest.raises(ConfigError, match="rounds=0"):
        bench_stack(**{**TINY, "rounds": 0})
