"""Substitutes are killed after each of their epochs, and end with the same weights for the same charge."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_fakes import FAST, FakeBlackBox, Substitute, same, steal
from torch import nn

from mea_ray.attacks import ATTACKS, generator_game
from mea_ray.attacks.base import Attack
from mea_ray.attacks.generator_game import GeneratorGame
from mea_ray.attacks.transfer import TransferSet
from mea_ray.training.snapshot import SnapshotFile

TRAINING = {**FAST, "epochs": 4}
ATTACK: dict[str, dict[str, Any]] = {
    "distillation": {},
    "requery": {"requery": True},
    "jbda": {"seed_size": 20},
    "active": {"initial": 20, "round_images": 20},
}


class Killed(Exception):
    """The process died here."""


def make(name: str) -> Attack:
    attack: Attack = ATTACKS.build("distillation" if name == "requery" else name, query_chunk=16, **ATTACK[name])
    return attack


class Processes:
    """One process after the other works in a folder; each dies after its first snapshot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.deaths, self.notes = folder, 0, list[str]()
        self.paid: dict[tuple[int, str], int] = {}
        save = SnapshotFile.save

        def save_and_die(file: SnapshotFile, state: Any) -> None:
            save(file, state)
            self.deaths += 1
            raise Killed

        monkeypatch.setattr(SnapshotFile, "save", save_and_die)

    def transfer(self) -> TransferSet:
        return TransferSet(self.folder, snapshot_every_s=0.0, on_damage=self.notes.append)

    def steal(self, attack: Callable[[], Attack], budgets: list[int], **rest: Any) -> Any:
        while True:
            transfer = self.transfer()
            box = FakeBlackBox(paid=self.paid, start_at=attack().answered_images(transfer, budgets))
            try:
                return steal(box, budgets, attack(), training=TRAINING, transfer=transfer, **rest), box
            except Killed:
                self.paid = box.paid


@pytest.mark.parametrize("name", ATTACK)
def test_a_substitute_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = [160] if name == "requery" else [60, 160]
    alone = FakeBlackBox()
    whole = steal(alone, budgets, make(name), training=TRAINING)
    processes = Processes(monkeypatch, tmp_path)
    result, box = processes.steal(partial(make, name), budgets)
    assert processes.deaths >= 4 * len(budgets), "a training was not killed after each epoch"
    assert all(same(one.model, other.model) for one, other in zip(whole, result, strict=True))
    assert [one.epochs for one in result] == [4] * len(budgets) and box.charged == alone.charged
    assert any("goes on after epoch 3 of 4" in note for note in processes.notes)
    assert not list(tmp_path.rglob("*.state")), "the snapshots of a finished theft are removed"


def test_answers_that_were_lost_are_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steal(FakeBlackBox(), [160], make("requery"), training=TRAINING)
    processes = Processes(monkeypatch, tmp_path)
    with pytest.raises(Killed):
        transfer = TransferSet(tmp_path, snapshot_every_s=0.0)
        steal(FakeBlackBox(), [160], make("requery"), training=TRAINING, transfer=transfer)
    for chunk in tmp_path.rglob("chunk-*.npz"):
        chunk.unlink()
    result, _ = processes.steal(partial(make, "requery"), [160])
    assert same(whole[0].model, result[0].model)
    assert any("cannot be used" in note and "begins anew" in note for note in processes.notes)


def test_without_snapshots_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(monkeypatch, tmp_path)
    transfer = TransferSet(tmp_path, snapshot_every_s=None)
    steal(FakeBlackBox(), [60], make("distillation"), training=TRAINING, transfer=transfer)
    assert processes.deaths == 0


DATA_FREE: dict[str, dict[str, Any]] = {
    "dfme": {"student": {"steps": 2}},
    "maze": {"student": {"steps": 3}, "replay": {"steps": 2, "images": 20, "reuse_batch": True}},
}


def game(name: str) -> Attack:
    small = {"noise_size": 5, "width": 4, "learning_rate": 1e-3, **({"directions": 2} if name == "maze" else {})}
    attack: Attack = ATTACKS.build(name, batch_size=6, generator=small, decay_at=(100,), **DATA_FREE[name])
    return attack


class Dropped(Substitute):
    """A linear network whose inputs are dropped at random in training, and that normalises batches."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.3))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", DATA_FREE)
def test_a_game_goes_on_within_a_rung(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each iteration: the same bits, charges and curves, and nothing is learnt twice."""
    updates: list[int] = []
    teach = GeneratorGame.teach

    def count(self: GeneratorGame, *args: Any, **rest: Any) -> None:
        updates.append(self.updates)
        teach(self, *args, **rest)

    monkeypatch.setattr(GeneratorGame, "teach", count)
    monkeypatch.setattr(generator_game, "LOG_EVERY", 3)
    budgets = [400]
    alone = FakeBlackBox()
    (whole,) = steal(alone, budgets, game(name), make_model=Dropped)
    once, updates[:] = list(updates), []
    processes = Processes(monkeypatch, tmp_path)
    (result,), box = processes.steal(partial(game, name), budgets, make_model=Dropped)
    assert processes.deaths == len(once) // game_updates(name) > 8
    assert updates == once, "the student is taught each batch once, over all processes"
    assert same(whole.model, result.model) and whole.queries == result.queries
    assert whole.curves and dict(whole.curves) == dict(result.curves)
    assert box.charged == alone.charged == whole.queries
    assert any("goes on after" in note for note in processes.notes)
    assert not list(tmp_path.rglob("*.state"))


def game_updates(name: str) -> int:
    return {"dfme": 2, "maze": 5}[name]


@pytest.mark.parametrize("name", DATA_FREE)
def test_a_game_begins_anew_where_its_snapshot_does_not_fit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = steal(FakeBlackBox(), [120, 300], game(name), make_model=Dropped)
    processes = Processes(monkeypatch, tmp_path)
    for _ in range(6):
        with pytest.raises(Killed):
            steal(FakeBlackBox(), [300], game(name), make_model=Dropped, transfer=processes.transfer())
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.undo()

    def again(budgets: list[int], *, lost: str = "-", **rest: Any) -> tuple[list[Any], str]:
        for path in list(tmp_path.iterdir()):
            path.unlink()
        for known, content in kept.items():
            if not fnmatch(known, lost):
                (tmp_path / known).write_bytes(content)
        notes: list[str] = []
        transfer = TransferSet(tmp_path, snapshot_every_s=1e6, on_damage=notes.append)
        rungs = steal(FakeBlackBox(), budgets, game(name), make_model=Dropped, transfer=transfer, **rest)
        return rungs, " ".join(notes)

    rungs, notes = again([300])
    assert same(rungs[0].model, large.model) and "goes on after" in notes
    rungs, notes = again([120, 300])  # a rung of before the snapshot is wanted
    assert same(rungs[0].model, small.model) and same(rungs[1].model, large.model)
    assert "a substitute of 120 is wanted" in notes and "begins anew" in notes
    rungs, notes = again([120, 300], skip={120})
    assert same(rungs[0].model, large.model) and "goes on after" in notes
    rungs, notes = again([300], lost="chunk-*.npz")
    assert same(rungs[0].model, large.model) and "begins anew" in notes
    state = next(known for known in kept if known.endswith(".state"))
    kept[state] = kept[state][:-9] + b"x" * 9
    rungs, notes = again([300])
    assert same(rungs[0].model, large.model) and "is damaged" in notes
