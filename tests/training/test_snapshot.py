from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keyword_training import train

from mea_ray.attacks.learning import DistillationObjective, Learning
from mea_ray.models.build import build_model
from mea_ray.training.engine import TrainReport
from mea_ray.training.objective import CrossEntropy, Objective
from mea_ray.training.snapshot import SnapshotFile

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
LABELS = RANDOM.integers(0, 4, 40)
WEIGHTS_SEED = 1
SETTINGS: dict[str, Any] = {"epochs": 5, "batch_size": 16, "optimizer": "adam", "seed": 3}


class Killed(Exception):
    """Stands for the death of the process."""


def cross_entropy() -> Objective:
    return CrossEntropy()


def mixed_distillation() -> Objective:
    answers = np.eye(4, dtype=np.float32)[LABELS]
    return DistillationObjective(Learning(mixing="mixup"), answers)


def run(
    objective: Objective, snapshots: SnapshotFile | None, die_after: int | None = None, **more: Any
) -> tuple[Any, TrainReport]:
    torch.manual_seed(WEIGHTS_SEED)
    model = build_model("vgg_like", (1, 16, 16), 4, {"width": 0.0625})

    def on_epoch(record: dict[str, Any]) -> None:
        if record["epoch"] == die_after and "resumed" not in record:
            raise Killed

    report = train(model, IMAGES, LABELS, objective, snapshots=snapshots, on_epoch=on_epoch, **{**SETTINGS, **more})
    return model.state_dict(), report


@pytest.mark.parametrize("make", [cross_entropy, mixed_distillation])
@pytest.mark.parametrize("more", [{}, {"early_stop_patience": 2, "validate": lambda model: 1.0}], ids=["all", "early"])
def test_a_killed_training_goes_on_bit_for_bit(make: Any, more: dict[str, Any], tmp_path: Path) -> None:
    expected, whole = run(make(), None, **more)
    path = tmp_path / "state"
    with pytest.raises(Killed):
        run(make(), SnapshotFile(path, every_s=0), die_after=2, **more)
    assert path.exists()
    torch.rand(7)  # another process has another global stream
    result, report = run(make(), SnapshotFile(path, every_s=0), **more)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert [(r["epoch"], r["loss"]) for r in report.history] == [(r["epoch"], r["loss"]) for r in whole.history]
    assert report.images == whole.images and not path.exists()


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (lambda data: data[:-5] + b"wrong", "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: hashlib.sha256(b"no snapshot").digest() + b"no snapshot", "cannot be read"),
    ],
)
def test_a_damaged_one_is_thrown_away_with_one_line(spoil: Any, note: str, tmp_path: Path) -> None:
    expected, _ = run(cross_entropy(), None)
    path, notes = tmp_path / "state", list[str]()
    with pytest.raises(Killed):
        run(cross_entropy(), SnapshotFile(path, every_s=0), die_after=2)
    path.write_bytes(spoil(path.read_bytes()))
    result, report = run(cross_entropy(), SnapshotFile(path, every_s=0, notify=notes.append))
    assert all(torch.equal(result[name], value) for name, value in expected.items()) and report.epochs == 5
    assert len(notes) == 1 and note in notes[0] and str(path) in notes[0] and "begins anew" in notes[0]


@pytest.mark.parametrize("other", ["seed", "setting", "images", "weights", "objective"])
def test_one_of_another_training_is_thrown_away_with_one_line(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, notes = tmp_path / "state", list[str]()
    with pytest.raises(Killed), monkeypatch.context() as patch:
        if other == "images":
            patch.setitem(globals(), "IMAGES", np.roll(IMAGES, 1, axis=0))
        if other == "weights":
            patch.setitem(globals(), "WEIGHTS_SEED", 2)
        make = mixed_distillation if other == "objective" else cross_entropy
        changed: dict[str, dict[str, Any]] = {"seed": {"seed": 4}, "setting": {"learning_rate": 2e-3}}
        more = changed.get(other, {})
        run(make(), SnapshotFile(path, every_s=0), die_after=2, **more)
    expected, _ = run(cross_entropy(), None)
    result, _ = run(cross_entropy(), SnapshotFile(path, every_s=0, notify=notes.append))
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert len(notes) == 1 and "of another training" in notes[0] and not path.exists()


def test_a_stored_one_gives_the_trained_network_and_all_its_records(tmp_path: Path) -> None:
    path, received = tmp_path / "state", list[dict[str, Any]]()
    expected, whole = run(cross_entropy(), SnapshotFile(path, every_s=0, keep=True))
    torch.manual_seed(WEIGHTS_SEED)
    model = build_model("vgg_like", (1, 16, 16), 4, {"width": 0.0625})
    file = SnapshotFile(path, every_s=0, keep=True)
    report = train(model, IMAGES, LABELS, cross_entropy(), snapshots=file, on_epoch=received.append, **SETTINGS)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert report.history == whole.history and report.images == whole.images and not model.training
    assert [(each["epoch"], each["resumed"]) for each in received] == [(5, 5)]
    trained = sum(each["seconds"] for each in whole.history)
    assert report.seconds > 0.9 * trained, "the time of the earlier process counts"


def test_a_short_training_writes_nothing_and_neither_does_an_objective_with_a_memory(tmp_path: Path) -> None:
    class Remembers(CrossEntropy):
        resumable = False

    for snapshots, objective in (
        (SnapshotFile(tmp_path / "a"), CrossEntropy()),
        (SnapshotFile(tmp_path / "b", every_s=0), Remembers()),
    ):
        with pytest.raises(Killed):
            run(objective, snapshots, die_after=4)
    assert not list(tmp_path.iterdir())
