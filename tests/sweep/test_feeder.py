from __future__ import annotations

from typing import Any

from mea_ray.sweep.feeder import Feeder
from mea_ray.sweep.schedule import Node, Schedule


class Trainings:
    """Stands for `Tasks`: what is submitted ends at the next look, some with an error."""

    def __init__(self, broken: set[str]) -> None:
        self.broken, self.running, self.most = broken, list[str](), 0

    def train(self, name: str) -> None:
        self.running.append(name)
        self.most = max(self.most, len(self.running))

    def poll(self, timeout_s: float) -> list[tuple[str, None, Exception | None]]:
        ended, self.running = self.running, []
        return [(name, None, RuntimeError("no memory") if name in self.broken else None) for name in ended]

    def cancel(self) -> None:
        self.running = []


def made(broken: set[str], fail: Any, trainings: int) -> tuple[Feeder, Trainings]:
    nodes = [Node(f"t{v}-{t}", f"s{v}", (f"v{v}", "null")) for v in range(3) for t in range(2)]
    tasks: Any = Trainings(broken)
    schedule = Schedule(nodes, services=1, slots=4, trainings=trainings)
    return Feeder(schedule, {}, tasks.train, tasks, fail, lambda text: None), tasks


def test_all_models_can_be_trained_before_there_is_a_service_as_many_at_once_as_find_room() -> None:
    failed: dict[str, str] = {}
    feeder, tasks = made({"v1"}, failed.__setitem__, trainings=2)
    feeder.train_all()
    assert tasks.most == 2 and feeder.schedule.absent == 0
    reason = "model v1 could not be trained: RuntimeError: no memory"
    assert failed == {"t1-0": reason, "t1-1": reason} and feeder.left == 4


def test_the_sweep_is_not_over_before_the_last_trial_that_is_given_up_counts_as_failed() -> None:
    left: list[int] = []
    failed: list[str] = []

    def fail(trial: str, reason: str) -> None:
        left.append(feeder.left)
        failed.append(trial)

    feeder, _ = made({"null"}, fail, trainings=1)
    feeder.train_all()
    assert len(failed) == 6 and min(left) >= 1 and feeder.left == 0
