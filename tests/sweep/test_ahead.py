"""Points of an adaptive search, held back until their models and their service are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher
from tiny import tiny_sweep

from mea_ray.sweep import events
from mea_ray.sweep.ahead import Ahead
from mea_ray.sweep.runner import run_sweep
from mea_ray.sweep.schedule import Node, Schedule


class Inner(Searcher):
    """Suggests 0, 1, 2, ..., and notes what it is called with."""

    def __init__(self, most: int = 10**9) -> None:
        super().__init__(metric="wsr", mode="max")
        self.asked, self.ended, self.most = 0, list[tuple[str, Any]](), most

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        if self.asked == self.most:
            return str(Searcher.FINISHED)
        self.asked += 1
        return {"p0": self.asked - 1, "as": trial_id}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.ended.append((trial_id, result))

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


def ahead(inner: Inner, most: int, samples: int, service: str = "") -> tuple[Ahead, Schedule, set[str]]:
    schedule, up = Schedule([], 1, most, trainings=1, grows=True), set[str]()

    def prepare(name: str, config: Mapping[str, Any]) -> None:
        schedule.add(Node(name, service, (f"victim-{config['p0']}",)))

    feeder: Any = SimpleNamespace(next_trial=lambda: schedule.next_trial(up), ended=schedule.ended)
    return Ahead(inner, feeder, prepare, most=most, samples=samples), schedule, up


def test_a_point_is_given_out_when_its_model_is_trained_and_no_slot_waits_for_it() -> None:
    inner = Inner()
    search, schedule, _ = ahead(inner, most=2, samples=3)
    assert search.suggest("a") is None and inner.asked == 2, "no more points than trials run at once"
    assert schedule.models_to_train() == ["victim-0"] and schedule.models_to_train() == []
    schedule.model_ready("victim-0")
    given = search.suggest("b")
    assert given == {"p0": 0, "as": "point-0"} and schedule.running == 1
    assert search.suggest("c") is None and inner.asked == 2
    search.on_trial_complete("b", {"wsr": 0.5})
    assert inner.ended == [("point-0", {"wsr": 0.5})], "by the name that the search knows it by"
    assert search.suggest("d") is None and inner.asked == 3 and schedule.running == 0
    assert schedule.models_to_train() == ["victim-1"]


def test_points_out_of_order_and_models_that_are_there() -> None:
    search, schedule, _ = ahead(Inner(), most=3, samples=3)
    assert search.suggest("a") is None
    schedule.model_ready("victim-2")
    assert search.suggest("b") == {"p0": 2, "as": "point-2"}
    schedule.add(Node("again", "", ("victim-2",)))
    assert schedule.next_trial(set()) == "again", "a model that is trained is not trained again"


def test_a_service_waits_for_points_that_are_not_known_yet_and_makes_way_for_others() -> None:
    search, schedule, up = ahead(Inner(), most=1, samples=2, service="s0")
    search.suggest("a")
    schedule.model_ready("victim-0")
    assert search.suggest("b") is None and schedule.services_wanted({}).start == ["s0"]
    up.add("s0")
    assert search.suggest("c") == {"p0": 0, "as": "point-0"}
    search.on_trial_complete("c", {})
    assert schedule.services_wanted({"s0": False}) == ([], []), "the next point may ask it"
    assert schedule.services_left() == 1
    schedule.add(Node("other", "s1", ()))
    assert schedule.services_wanted({"s0": False}) == ([], ["s0"])


def test_a_search_that_has_no_more_points_ends_when_the_last_was_given_out() -> None:
    search, schedule, _ = ahead(Inner(most=1), most=2, samples=5)
    assert search.suggest("a") is None
    schedule.model_ready("victim-0")
    assert search.suggest("b") == {"p0": 0, "as": "point-0"}
    assert search.suggest("c") == Searcher.FINISHED


def test_a_growing_schedule_drops_points_that_were_held_back() -> None:
    search, schedule, _ = ahead(Inner(), most=2, samples=4)
    search.suggest("a")
    schedule.model_ready("victim-0")
    schedule.forget()
    assert schedule.left == 0 and schedule.next_trial(set()) is None


@pytest.mark.slow
def test_models_of_an_adaptive_search_are_trained_before_their_trials(tmp_path: Path, ray_session: None) -> None:
    more: dict[str, Any] = {
        "space": {"victim.training.learning_rate": {"loguniform": [1e-3, 1e-2]}},
        "search": {"name": "optuna", "samples": 2, "metric": "accuracy"},
    }
    received: list[events.Event] = []
    outcome = run_sweep(tiny_sweep(tmp_path, **more), on_event=received.append)
    assert len(outcome.results) == 2 and not outcome.failed
    ready = {event.name: place for place, event in enumerate(received) if isinstance(event, events.ModelReady)}
    begun = {event.trial: place for place, event in enumerate(received) if isinstance(event, events.TrialStarted)}
    for result in outcome.results:
        for name in (result.victim, *result.nulls):
            assert ready[name] < begun[result.trial], "trained in no slot of a trial"
