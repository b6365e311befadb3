"""A storage that is damaged, taken away or full costs time, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest

from mea_ray.sweep import events
from mea_ray.sweep.runner import SweepOutcome, run_sweep

TRIALS = 2


def _config(storage: Path, **more: Any) -> Any:
    return harness.sweep(storage, seeds=TRIALS, per_second=64, **more)


@pytest.fixture(scope="module")
def quiet(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a sweep that nothing happened to."""
    storage = tmp_path_factory.mktemp("quiet") / "storage"
    assert not run_sweep(_config(storage)).failed
    return storage


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _warned(received: list[events.Event]) -> list[str]:
    return [event.message for event in received if isinstance(event, events.Warned)]


@pytest.mark.slow
def test_what_is_damaged_is_done_again_and_nothing_else(quiet: Path, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(quiet, storage)
    folder = storage / "s"
    first, second = sorted(path.stem for path in (folder / "results").glob("*.json"))
    damaged = [
        folder / "results" / f"{first}.json",
        folder / "trials" / first / "rungs" / "96.json",
        folder / "trials" / first / "transfer" / "chunk-000000000048.npz",
        folder / "trials" / second / "substitutes" / "48" / "model.safetensors",
        *(storage / "artifacts" / "victims").glob("*/model.safetensors"),
    ]
    for path in damaged:
        _flip(path)
    (folder / "results" / f"{second}.json").unlink()
    remaining = folder / "trials" / first / "rungs" / "48.json"
    before = remaining.stat().st_mtime_ns
    received: list[events.Event] = []
    assert not run_sweep(_config(storage), resume=True, on_event=received.append).failed
    assert harness.differences(harness.metrics(folder), harness.metrics(quiet / "s")) == []
    assert harness.charged(folder) == dict.fromkeys([first, second], 96)
    assert remaining.stat().st_mtime_ns == before, "what is sound is not done again"
    messages = _warned(received)
    for path in damaged:
        part = path.parent if path.parent.parent.name == "victims" else path
        assert sum(str(part) in each for each in messages) == 1, (path, messages)
    assert len(messages) == len(damaged)


def _take_away(storage: Path, seconds: float) -> threading.Thread:
    away = storage.with_name("elsewhere")
    storage.rename(away)

    def bring_back() -> None:
        time.sleep(seconds)
        away.rename(storage)  # fails if somebody began anew where it was

    thread = threading.Thread(target=bring_back)
    thread.start()
    return thread


@pytest.mark.slow  # beside other tests in one Ray it failed once in two runs, for a reason not found yet
@pytest.mark.parametrize("seconds", [3, 60])
def test_a_storage_that_is_away_for_a_while_is_waited_for(quiet: Path, tmp_path: Path, seconds: float) -> None:
    storage = tmp_path / "storage"
    received: list[events.Event] = []
    back: list[threading.Thread] = []

    def listen(event: events.Event) -> None:
        received.append(event)
        if isinstance(event, events.RungFinished) and not back:
            back.append(_take_away(storage, seconds))

    outcome = run_sweep(_config(storage), on_event=listen)
    back[0].join()
    _nothing_happened(outcome, quiet)
    waited, again = _warned(received)
    assert "is away; waiting for it" in waited and "takes files again" in again


def _nothing_happened(outcome: SweepOutcome, quiet: Path) -> None:
    assert not outcome.failed
    assert harness.differences(harness.metrics(outcome.folder), harness.metrics(quiet / "s")) == []
    assert harness.charged(outcome.folder) == dict.fromkeys(harness.metrics(quiet / "s"), 96)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 48 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill(disk: Path) -> Path:
    file = disk / "others"
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(os.urandom(1 << 16))
        except OSError:
            pass
    return file


@pytest.mark.slow
def test_a_full_disk_is_waited_for(quiet: Path, small_disk: Path) -> None:
    received: list[events.Event] = []
    timers: list[threading.Timer] = []

    def listen(event: events.Event) -> None:
        received.append(event)
        if isinstance(event, events.RungFinished) and not timers:
            timers.append(threading.Timer(20, _fill(small_disk).unlink))
            timers[0].start()

    outcome = run_sweep(_config(small_disk / "storage"), on_event=listen)
    _nothing_happened(outcome, quiet)
    messages = _warned(received)
    assert sum("is full; waiting for it" in each for each in messages) == 1, messages


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_sweep_with_what_to_do(quiet: Path, small_disk: Path) -> None:
    filled: list[Path] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RungFinished) and not filled:
            filled.append(_fill(small_disk))

    more = {"max_failures": 0, "base__resources__storage_patience_s": 5}
    outcome = run_sweep(_config(small_disk / "storage", **more), on_event=listen)
    assert outcome.failed
    for reason in outcome.failed.values():
        assert "is full" in reason and "--resume" in reason and "\n" not in reason, reason
    filled[0].unlink()
    _nothing_happened(run_sweep(_config(small_disk / "storage"), resume=True), quiet)
    assert json.loads((small_disk / "storage" / "s" / "plan.json").read_text())["trial_count"] == TRIALS
