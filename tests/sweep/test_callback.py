"""How the driver learns why a trial ended: from text, and never by opening what the trial's process pickled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from mea_ray.core.errors import ReplicasAway, ServiceUnavailable
from mea_ray.sweep import events
from mea_ray.sweep.callback import Failure, TuneCallback

NO_MEMORY = "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2) was 9 GB"
NODE_GONE = "The actor died because its node has died. Node Id: 3f"


def raised(error: Exception) -> str:
    """The text of an error of a trial, as Ray makes it."""
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    trace = f"ray::ImplicitFunc.train()\n  File x, line 1\n{name}: {error}"
    return str(RayTaskError("train", trace, error))


@pytest.mark.parametrize(
    ("entries", "kind", "reason"),
    [
        ([raised(ReplicasAway("away for 20 s"))], "ReplicasAway", "ReplicasAway: away for 20 s"),
        ([raised(ReplicasAway("away")), str(RayActorError())], "", "its process died"),
        ([str(RayActorError()), raised(ServiceUnavailable("gone"))], "ServiceUnavailable", "ServiceUnavailable: gone"),
        ([NODE_GONE], "", "its node is gone"),
        ([NO_MEMORY], "", "its machine ran out of memory"),
        ([raised(ValueError("a wrong value"))], "", "ValueError: a wrong value"),
        ([], "", "unknown"),
    ],
)
def test_the_last_entry_says_why(entries: list[str], kind: str, reason: str, tmp_path: Path) -> None:
    text = "".join(f"Failure # {number} (occurred at 2026)\n{entry}\n" for number, entry in enumerate(entries, 1))
    (tmp_path / "error.txt").write_text(text)
    failure = Failure.of(str(tmp_path / "error.txt"))
    assert failure.kind == kind and failure.reason.startswith(reason) and "\n" not in failure.reason


def test_without_a_file_it_is_unknown(tmp_path: Path) -> None:
    assert Failure.of(None).reason == Failure.of(str(tmp_path / "none")).reason == "unknown"


@pytest.mark.parametrize(
    ("error", "event_type"),
    [(ReplicasAway("away"), events.TrialMadeWay), (ServiceUnavailable("gone"), events.TrialRestarted)],
)
def test_a_trial_that_makes_way_has_an_event_of_its_own(error: Exception, event_type: type, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(f"Failure # 1\n{raised(error)}\n")
    # What a trial's process sent, opened, would run its code here.
    (tmp_path / "error.pkl").write_bytes(b"cos\n_exit\n(I3\ntR.")
    received: list[events.Event] = []
    finisher: Any = SimpleNamespace(emit=received.append, name_of=lambda trial: "t1")
    trial = SimpleNamespace(
        error_file=str(tmp_path / "error.txt"),
        pickled_error_file=str(tmp_path / "error.pkl"),
        local_path=str(tmp_path),
        run_metadata=SimpleNamespace(pickled_error_filename="error.pkl"),
    )
    TuneCallback(finisher).on_trial_recover(1, [], trial)
    assert [type(event) for event in received] == [event_type]
