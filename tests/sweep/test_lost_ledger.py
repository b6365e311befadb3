"""A trial whose service's ledger does not know of its answers, and what stays of a trial that has finished."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from golden import MadeUp
from tiny import tiny_sweep

from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import KeepConfig
from mea_ray.core.errors import UnknownClient
from mea_ray.experiment.journal import BEGUN
from mea_ray.sweep import events
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.plan import plan
from mea_ray.sweep.trial import SharedService, Tools, tidy


class Ledger:
    """Stands for a running service: it knows one charge, or nobody."""

    def __init__(self, charged: int | None) -> None:
        self._charged = charged
        self.forgotten: list[str] = []

    def charged(self, client: str) -> int:
        if self._charged is None:
            raise UnknownClient(client)
        return self._charged

    def forget(self, client: str) -> None:
        self.forgotten.append(client)


def shared(tmp_path: Path, charged: int | None, *, begun: bool = True) -> tuple[SharedService, list[events.Event]]:
    """The service of a trial that holds four answers."""
    sweep = tiny_sweep(tmp_path)
    trial = plan(sweep, MadeUp()).trials[0]
    seen: list[events.Event] = []
    folder = SweepFolder(str(tmp_path), "s")
    journal = folder.trial(trial.name)
    TransferSet(journal.folder / "transfer").append(np.arange(4), np.full((4, 10), 0.1, np.float32))
    if begun:
        journal.path(BEGUN).write_text("{}")
    (journal.folder / "rungs").mkdir()
    service = SharedService(trial, SimpleNamespace(), journal, Tools(folder, None, seen.append, None))  # type: ignore[arg-type]
    service.service = Ledger(charged)  # type: ignore[assignment]
    return service, seen


@pytest.mark.parametrize("charged", [None, 0, 3])
def test_a_theft_begins_anew_when_its_ledger_was_lost(tmp_path: Path, charged: int | None) -> None:
    service, seen = shared(tmp_path, charged)
    service.check_ledger()
    assert len(service.transfer) == len(service.journal.transfer) == 0
    assert not (service.journal.folder / "rungs").exists()
    (warning,) = seen
    assert isinstance(warning, events.Warned)
    assert f"ledger of its service was lost ({charged or 0} of 4 answers" in warning.message


@pytest.mark.parametrize("charged", [4, 6])
def test_it_goes_on_where_all_of_its_answers_are_charged(tmp_path: Path, charged: int) -> None:
    service, seen = shared(tmp_path, charged)
    service.check_ledger()
    assert len(service.journal.transfer) == 4 and not seen


def test_answers_of_another_theft_are_left_to_the_attack_which_refuses_them(tmp_path: Path) -> None:
    service, seen = shared(tmp_path, None, begun=False)
    service.check_ledger()
    assert len(service.journal.transfer) == 4 and not seen


def test_what_is_not_to_stay_of_a_finished_trial_goes(tmp_path: Path) -> None:
    service, _ = shared(tmp_path, 4)
    folder = service.journal.folder
    (folder / "substitutes" / "48").mkdir(parents=True)
    tidy(service.journal, service, KeepConfig())
    assert (folder / "substitutes").exists() and (folder / "transfer").exists()
    tidy(service.journal, service, KeepConfig(substitutes=False, answers=False, query_logs=False))
    assert not (folder / "substitutes").exists() and not (folder / "transfer").exists()
    assert (folder / "rungs").exists()
    ledger: Any = service.service
    assert ledger.forgotten == [service.trial.name]
