"""The efficiency benchmark: what it refuses, and that it compares the same trials."""

from __future__ import annotations

from typing import Any

import pytest

from mea_ray.bench import efficiency
from mea_ray.core.errors import ConfigError


@pytest.mark.parametrize("wrong", [{"workers": 1}, {"workers": 10**4}, {"trials": 3}, {"trials": 0}, {"repeats": 0}])
def test_what_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        efficiency.bench_efficiency(**wrong)


def test_efficiency_is_the_speed_up_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int, int]] = []

    def seconds(tree: dict[str, Any], workers: int) -> float:
        ran.append((tree["name"], workers, len(tree["space"].get("seed", {}).get("grid", ()))))
        return 12.0 if workers == 1 else 7.5

    monkeypatch.setattr(efficiency, "_seconds", seconds)
    measured = efficiency.bench_efficiency(trials=4, repeats=2)
    assert measured["speedup"] == pytest.approx(1.6) and measured["efficiency"] == pytest.approx(0.8)
    assert measured["spread"] == pytest.approx((0.8, 0.8))
    # In turns, in both orders, the same trials each time, after the models were made.
    assert ran == [("models", 2, 0), *((f"turn{t}-{w}", w, 4) for t, w in ((0, 1), (0, 2), (1, 2), (1, 1)))]


@pytest.mark.slow
def test_real_trials_are_measured() -> None:
    measured = efficiency.bench_efficiency(trials=2, repeats=1, budget=48, epochs=1, width=0.0625)
    assert measured["seconds_1"] > 0 and measured["seconds_many"] > 0
