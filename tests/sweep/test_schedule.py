from __future__ import annotations

import random

import pytest

from mea_ray.sweep.schedule import Node, Schedule, best_services
from mea_ray.sweep.simulation import Simulation, workload


def graph(victims: int, each: int, *, services: int = 1, slots: int = 2) -> Schedule:
    """Victims v0, v1, ... with a service s0, s1, ... and some trials t0-0, t0-1, ... each."""
    nodes = [Node(f"t{v}-{t}", f"s{v}", (f"v{v}", "null")) for v in range(victims) for t in range(each)]
    return Schedule(nodes, services, slots)


def test_a_trial_is_given_out_when_its_models_and_its_service_are_there() -> None:
    one = graph(2, 2, slots=8)
    assert one.models_to_train() == ["v0", "null", "v1"] and one.models_to_train() == []
    assert one.next_trial({"s0", "s1"}) is None
    one.model_ready("v1")
    assert one.next_trial({"s0", "s1"}) is None, "its null model is missing"
    one.model_ready("null")
    assert one.next_trial({"s0"}) is None and one.next_trial({"s0", "s1"}) == "t1-0"
    assert one.next_trial(set()) is None and one.left == 3 and one.running == 1
    assert one.reason(set()) == "1 trials wait for a service (0 of 1 are up)"


def test_models_are_trained_as_slots_are_there_those_of_a_victim_side_by_side() -> None:
    one = graph(3, 1, slots=2)
    assert one.models_to_train() == ["v0", "null"]
    one.model_ready("null")
    assert one.models_to_train() == ["v1"]


def test_trainings_have_a_limit_of_their_own() -> None:
    one = Schedule([Node(f"t{v}", "s", (f"v{v}",)) for v in range(5)], 1, slots=1, trainings=4)
    assert len(one.models_to_train()) == 4 and one.absent == 5
    for name in ("v0", "v1"):
        one.model_ready(name)
    assert one.models_to_train() == ["v4"] and one.absent == 3


def test_a_service_is_started_for_trials_that_could_run_and_stopped_when_none_is_left() -> None:
    one = graph(2, 1)
    assert one.services_wanted({}) == ([], [])
    one.models_to_train()
    for model in ("v0", "v1", "null"):
        one.model_ready(model)
    assert one.services_wanted({}) == (["s0"], [])
    assert one.services_wanted({"s0": False}) == ([], []), "the other one waits for its turn"
    assert one.next_trial({"s0"}) == "t0-0"
    assert one.services_wanted({"s0": False}) == ([], []), "its trial was given out and has not taken hold yet"
    one.ended("t0-0")
    assert one.services_wanted({"s0": True}) == ([], []), "somebody holds it"
    assert one.services_wanted({"s0": False}) == (["s1"], ["s0"])


def test_a_service_whose_next_models_are_not_there_makes_way() -> None:
    nodes = [Node("a", "s0", ("v",)), Node("b", "s0", ("late",)), Node("c", "s1", ("v",))]
    one = Schedule(nodes, 1, 4)
    one.models_to_train()
    one.model_ready("v")
    assert one.next_trial({"s0"}) == "a"
    one.ended("a")
    start, stop = one.services_wanted({"s0": False})
    assert stop == ["s0"] and start == []
    assert one.services_wanted({}).start == ["s1"]


def test_trials_of_a_lost_model_or_service_are_given_up_and_no_others() -> None:
    one = graph(3, 2, services=3, slots=1)
    assert one.models_to_train() == ["v0"]
    assert one.model_lost("v0") == ["t0-0", "t0-1"]
    for _ in range(3):
        for model in one.models_to_train():
            one.model_ready(model)
    assert one.service_lost("s1") == ["t1-0", "t1-1"]
    assert one.next_trial({"s1", "s2"}) == "t2-0" and one.left == 1


def test_what_was_given_out_to_a_run_that_ended_is_given_out_again() -> None:
    one = graph(1, 2)
    for model in one.models_to_train():
        one.model_ready(model)
    assert [one.next_trial({"s0"}) for _ in range(3)] == ["t0-0", "t0-1", None]
    one.ended("t0-0")
    one.again({"t0-1"})
    assert one.next_trial({"s0"}) == "t0-1" and one.next_trial({"s0"}) is None


@pytest.mark.parametrize("order", range(20))
def test_every_trial_is_given_out_once_whatever_happens_when(order: int) -> None:
    rng = random.Random(order)
    victims, services = rng.randint(1, 6), rng.randint(1, 3)
    one = graph(victims, rng.randint(1, 5), services=services, slots=rng.randint(1, 4))
    total, given, training, running, up = one.left, list[str](), list[str](), list[str](), dict[str, int]()
    for _ in range(3000):
        training += one.models_to_train()
        wanted = one.services_wanted({name: held > 0 for name, held in up.items()})
        for name in wanted.stop:
            assert up.pop(name) == 0, "nothing that is held is stopped"
        for name in wanted.start:
            up[name] = 0
        assert len(up) <= services
        if training and rng.random() < 0.3:
            one.model_ready(training.pop(rng.randrange(len(training))))
        if rng.random() < 0.5 and (trial := one.next_trial(up)) is not None:
            given.append(trial)
            running.append(trial)
            up[f"s{trial[1]}"] += 1
        if running and rng.random() < 0.3:
            ended = running.pop(rng.randrange(len(running)))
            up[f"s{ended[1]}"] -= 1
            one.ended(ended)
    assert len(given) == len(set(given)) == total and not running and one.services_left() == 0


@pytest.mark.parametrize(
    ("victims", "trials", "slots", "each", "wanted"),
    [(1, 100, 64, 0.25, 1), (50, 1000, 64, 0.25, 7), (50, 1000, 16, 0.25, 2), (2, 4, 4, 1.0, 2), (64, 64, 8, 1.0, 5)],
)
def test_as_many_services_as_let_most_trials_run(
    victims: int, trials: int, slots: int, each: float, wanted: int
) -> None:
    room = {count: int(slots - count * each) for count in range(1, victims + 1) if slots - count * each >= 1}
    assert best_services(victims, trials, len(room), room) == wanted


def test_a_thousand_trials_of_fifty_victims_keep_64_gpus_busy() -> None:
    work = workload(
        1000, 50, trial_s=lambda index: 400.0 + 300.0 * (index % 2), victim_s=3240, start_s=60, overhead_s=5
    )
    found = Simulation(work, 64, 7).run()
    assert found.of_ideal >= 0.85
    assert Simulation(work, 64, 1).run().of_ideal < 0.4, "with one service at a time"
    assert found.first_trial_s < 3240 + 120, "no trial waits for the last model"


def test_the_simulation_is_right_where_the_time_can_be_worked_out_by_hand() -> None:
    work = workload(4, 1, trial_s=lambda index: 10.0, victim_s=100, start_s=5, overhead_s=1, service=1)
    found = Simulation(work, 3, 1).run()
    assert found.seconds == 100 + 5 + 2 * 11 and found.first_trial_s == 105
    assert found.ideal_s == (4 * 10 + 100) / 3
