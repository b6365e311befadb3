"""The sweep benchmark: what it refuses, how it counts repeats, and that a killed sweep of stand-ins goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mea_ray.bench import sweep as bench
from mea_ray.core.errors import ConfigError


@pytest.mark.parametrize("wrong", [{"trials": 15}, {"few": 0}, {"at_once": 0}, {"seconds": -1.0}])
def test_counts_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        bench.bench_sweep(**wrong)


def test_repeats_are_trials_that_had_finished_and_began_again(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for name in "abc":
        (tmp_path / "results" / f"{name}.json").touch()
    # a and b had finished; d was under way. Afterwards b (wrongly), d and c began.
    (tmp_path / "begun.log").write_text("a\nb\nd\nb\nd\nc\n")
    result = bench._repeats(tmp_path, Counter("abd"), {"a", "b"}, trials=4)
    assert result == {"finished_before": 2, "repeated": 1, "begun_again": 1, "missing": 1}


def test_growth_is_that_of_the_second_half() -> None:
    assert bench._slope([(10, 900.0), (20, 1000.0), (30, 1001.0), (40, 1002.0)]) == pytest.approx(102.4)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_repeats_nothing() -> None:
    measured = bench.bench_sweep(trials=40, few=10, seconds=0.5, at_once=2)
    assert (measured["repeated"], measured["missing"], measured["failed"]) == (0, 0, 0)
    assert 20 <= measured["finished_before"] < 40 and measured["begun_again"] <= 2
    assert measured["seconds_per_trial"] >= 0.5 / 2 and measured["memory_ratio"] < 1.5
