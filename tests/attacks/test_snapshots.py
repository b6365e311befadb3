"""Substitutes are killed after each of their epochs, and end with the same weights for the same charge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attack_fakes import FAST, FakeBlackBox, same, steal

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.base import Attack
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

    def steal(self, name: str, budgets: list[int]) -> Any:
        while True:
            transfer = TransferSet(self.folder, snapshot_every_s=0.0, on_damage=self.notes.append)
            box = FakeBlackBox(paid=self.paid, start_at=make(name).answered_images(transfer, budgets))
            try:
                return steal(box, budgets, make(name), training=TRAINING, transfer=transfer), box
            except Killed:
                self.paid = box.paid


@pytest.mark.parametrize("name", ATTACK)
def test_a_substitute_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = [160] if name == "requery" else [60, 160]
    alone = FakeBlackBox()
    whole = steal(alone, budgets, make(name), training=TRAINING)
    processes = Processes(monkeypatch, tmp_path)
    result, box = processes.steal(name, budgets)
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
    result, _ = processes.steal("requery", [160])
    assert same(whole[0].model, result[0].model)
    assert any("cannot be used" in note and "begins anew" in note for note in processes.notes)


def test_without_snapshots_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(monkeypatch, tmp_path)
    transfer = TransferSet(tmp_path, snapshot_every_s=None)
    steal(FakeBlackBox(), [60], make("distillation"), training=TRAINING, transfer=transfer)
    assert processes.deaths == 0
