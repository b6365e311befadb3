"""Out of memory on a worker ends after a few tries, with one line of ours for each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError
from tiny import tiny_sweep

from mea_ray.config import write_yaml
from mea_ray.core.errors import ClusterError, DeviceOutOfMemory, OutOfMemory
from mea_ray.sweep import events, tasks
from mea_ray.sweep.plan import plan
from mea_ray.sweep.runner import run_sweep
from mea_ray.sweep.tasks import ATTEMPTS, Tasks
from mea_ray.sweep.tuning import Tuning

ROOT = Path(__file__).parents[2]


def killed(node: str, *pids: tuple[int, float]) -> OutOfMemoryError:
    """What Ray 2.60 says when it kills processes for want of memory."""
    lines = [
        f"{len(pids)} worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, "
        f"ID: {node}) was 9.02GB used / 23.54GB limit (0.382965)",
        "Considered workers: [",
        *(
            f"Selected to kill: (Actor(2d24): job ID=01, lease ID=04, task name=x, required resources={{CPU: 1}}, "
            f"pid={pid}, actual memory used={size:.2f}GB, worker ID=55)"
            for pid, size in pids
        ),
        "(Actor(54): job ID=01, pid=5, actual memory used=9.00GB, worker ID=77)",
        "]",
    ]
    return OutOfMemoryError("\n".join(lines))


class FakeRay:
    """Tasks that end at once, each with what comes next in its list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, list[Exception | None]]) -> None:
        self.outcomes, self.submitted = (
            {name: iter(each) for name, each in outcomes.items()},
            dict.fromkeys(outcomes, 0),
        )
        monkeypatch.setattr(ray, "wait", lambda references, timeout: (references[:1], references[1:]))
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(tasks, "PAUSE_S", 0.01)

    def submit(self, name: str) -> Callable[[], Any]:
        def submit() -> Any:
            self.submitted[name] += 1
            return name, self.submitted[name]

        return submit

    def get(self, reference: Any) -> Any:
        error = next(self.outcomes[reference[0]])
        if error is not None:
            raise error


def test_a_task_that_runs_out_of_memory_is_tried_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory = [killed("ab" * 28, (7, 1.0)) for _ in range(ATTEMPTS)]
    fake = FakeRay(
        monkeypatch,
        {
            "never": [*no_memory],
            "once": [no_memory[0], None],
            "gpu": [RayTaskError("f", "", DeviceOutOfMemory("a batch of 8 images")), None],
            "ok": [None],
            "dead": [WorkerCrashedError()],
        },
    )
    messages: list[str] = []
    running = Tasks(messages.append)
    for name in fake.submitted:
        running.add(name, f"training {name}", fake.submit(name))
    ended = {name: (reference, error) for name, reference, error in running.results()}
    assert fake.submitted == {"never": ATTEMPTS, "once": 2, "gpu": 2, "ok": 1, "dead": 1}
    assert ended["ok"] == (("ok", 1), None) and ended["once"] == (("once", 2), None)
    assert ended["gpu"] == (("gpu", 2), None) and "a GPU ran out of memory while training gpu; retrying" in messages
    assert isinstance(ended["never"][1], OutOfMemory)
    assert str(ended["never"][1]).startswith(f"out of memory {ATTEMPTS} times while training never; ")
    assert isinstance(ended["dead"][1], ClusterError) and "\n" not in str(ended["dead"][1])
    assert len(messages) == ATTEMPTS + 1 and all("\n" not in line for line in messages)


class Followed:
    """Stands for the finisher: three trials under way, on two nodes."""

    def __init__(self) -> None:
        self.ended: set[str] = set()
        self.runs_ended = 0
        self.failed: dict[str, str] = {}
        self.received: list[events.Event] = []
        self.emit = self.received.append

    def under_way(self) -> dict[str, tuple[str, int]]:
        places = {"a": ("ab" * 28, 7), "b": ("ab" * 28, 8), "c": ("cd" * 28, 7)}
        return {name: place for name, place in places.items() if name not in self.ended}

    def release(self, trial: str) -> None:
        pass

    def fail(self, trial: str, reason: str) -> None:
        self.failed[trial] = reason
        self.ended.add(trial)

    def interrupted(self, trials: Any, samples: int) -> bool:
        return not self.ended.issuperset(trials)


def runs(monkeypatch: pytest.MonkeyPatch, followed: Followed, outcomes: Iterator[Exception | None]) -> list[list[str]]:
    """Replace Tune: each run ends with the next outcome; None is a run in which all trials end."""
    begun: list[list[str]] = []

    def fit(self: Tuning, left: list[str], samples: int, notes: str) -> None:
        begun.append(left)
        error = next(outcomes)
        if error is None:
            followed.ended |= set(left)
            return
        raise RuntimeError("the run failed") from error

    monkeypatch.setattr(Tuning, "_fit", fit)
    return begun


def tuning(followed: Followed, max_failures: int) -> Tuning:
    sweep = SimpleNamespace(max_failures=max_failures, time_budget_s=None)
    context: Any = SimpleNamespace(sweep=sweep, points={"a": {}, "b": {}, "c": {}})
    return Tuning(context, followed, {}, 3)  # type: ignore[arg-type]


def test_the_trial_that_used_most_memory_is_counted_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = Followed()
    outcomes = [killed("ab" * 28, (8, 0.4), (7, 4.1), (99, 8.0))] * 3
    begun = runs(monkeypatch, followed, iter([*outcomes, None]))
    tuning(followed, max_failures=2).run(3)
    assert begun == [["a", "b", "c"]] * 3 + [["b", "c"]]
    assert list(followed.failed) == ["a"] and "ran out of memory" in followed.failed["a"]
    assert [event.trial for event in followed.received if isinstance(event, events.TrialRestarted)] == ["a", "a"]


def test_where_it_is_unknown_whose_memory_it_was_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = Followed()
    begun = runs(monkeypatch, followed, iter([OutOfMemoryError("low on memory")] * 2))
    tuning(followed, max_failures=1).run(3)
    assert len(begun) == 2 and set(followed.failed) == {"a", "b", "c"}


def test_another_error_of_tune_is_raised_and_ctrl_c_stays_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = Followed()
    runs(monkeypatch, followed, iter([ValueError("no")]))
    with pytest.raises(RuntimeError, match="the run failed"):
        tuning(followed, max_failures=1).run(3)
    monkeypatch.setattr(Tuning, "_fit", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        tuning(followed, max_failures=1).run(3)


@pytest.mark.slow
def test_what_the_user_sees_on_a_machine_without_memory(tmp_path: Path) -> None:
    write_yaml(tiny_sweep(tmp_path / "storage").base, tmp_path / "one.yaml")
    began = time.monotonic()
    made = subprocess.run(
        [sys.executable, "-m", "mea_ray", "run", str(tmp_path / "one.yaml")],
        # Any process uses more than that.
        env={**os.environ, "RAY_memory_usage_threshold": "0.01", "PYTHONPATH": str(ROOT), "COLUMNS": "500"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,  # for what hangs
    )
    lines = [line for line in made.stdout.splitlines() if line.strip()]
    print(f"{time.monotonic() - began:.0f} s:", *lines, sep="\n")
    news = [line for line in lines if "waiting for the first trial" not in line]  # one every 8 s, however long it takes
    assert made.returncode == 1 and len(news) < 10, made.stdout
    assert f"out of memory {ATTEMPTS} times while loading data digits" in made.stdout


def _greedy(trial: Any, prepared: Any, tools: Any, pid: int, node: str) -> None:
    """A trial that takes all memory."""
    import numpy as np

    tools.on_event(events.TrialStarted(trial.name, trial.point, pid, node, (48, 96), 0))
    values = []
    while trial.config.seed == 0:
        values.append(np.ones(2**25))
    while True:
        time.sleep(1)


GREEDY = """
import sys
from pathlib import Path
import test_out_of_memory as module
module.run_greedy(Path(sys.argv[1]))
"""


def run_greedy(storage: Path) -> None:
    """Run two trials, one of which takes all memory; print what happens."""
    sweep = tiny_sweep(storage, space={"seed": {"grid": [0]}}, max_failures=1)
    outcome = run_sweep(sweep, on_event=lambda event: print(type(event).__name__, event), work=_greedy)  # type: ignore[arg-type]
    print("FAILED", outcome.failed)


@pytest.mark.slow
def test_a_trial_that_takes_all_memory_is_given_up(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    if memory.available < 8e9:
        pytest.skip("less than 8 GB of memory are free")
    threshold = min(0.9, (memory.total - memory.available + 5e9) / memory.total)
    made = subprocess.run(
        [sys.executable, "-c", GREEDY, str(tmp_path)],
        env={
            **os.environ,
            "RAY_memory_usage_threshold": str(threshold),
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{ROOT / 'tests' / 'helpers'}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,  # for what hangs
    )
    (name,) = [trial.name for trial in plan(tiny_sweep(tmp_path, space={"seed": {"grid": [0]}})).trials]
    assert made.returncode == 0, made.stdout
    assert made.stdout.count("TrialRestarted ") == 1, made.stdout
    assert f"FAILED {{'{name}': 'its machine ran out of memory; " in made.stdout, made.stdout
