"""Two drivers on one sweep: the second is refused in one line, on this machine, another one, and in an object store."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from tiny import tiny_sweep

from mea_ray.cli.main import main
from mea_ray.config import write_yaml
from mea_ray.core.errors import ConfigError
from mea_ray.storage.remote import Storage
from mea_ray.sweep import cluster
from mea_ray.sweep.only_driver import LEASES, only_driver

SPAWN = multiprocessing.get_context("spawn")


def quiet(text: str) -> None:
    """Ignore what a driver says."""


def _drive(root: str) -> None:
    with only_driver(Storage(root), "s", quiet):
        (Path(root) / "drives").touch()
        time.sleep(60)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    (tmp_path / "storage").mkdir()
    write_yaml(tiny_sweep(tmp_path / "storage"), tmp_path / "s.yaml")
    return tmp_path / "storage"


def test_the_second_driver_is_refused_in_one_line_and_follows_a_killed_one_at_once(
    storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def ray_cluster(*_: Any) -> Any:
        started.append("Ray")
        raise ConfigError("far enough")

    monkeypatch.setattr(cluster, "ray_cluster", ray_cluster)
    first = SPAWN.Process(target=_drive, args=(str(storage),))
    first.start()
    while not (storage / "drives").exists():
        assert first.is_alive()
        time.sleep(0.02)
    for argv in (["sweep", str(storage.parent / "s.yaml")], ["sweep", str(storage.parent / "s.yaml"), "--resume"]):
        assert main(argv) == 2
        output = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert f"the sweep 's' is being run by process {first.pid} on " in output and "Traceback" not in output, output
    assert not started
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    began = time.monotonic()
    assert main(["sweep", str(storage.parent / "s.yaml")]) == 2
    assert started == ["Ray"] and time.monotonic() - began < 10.0
    assert "far enough" in capsys.readouterr().err
    left = [path.name for path in storage.rglob("*") if path.is_file()]
    assert left == ["drives"], "its name is free, and nothing was made"


def elsewhere(claim: Path) -> None:
    """Make the claim that of a driver on another machine."""
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "machine": "other/boot"}))


@pytest.mark.parametrize("kind", ["shared disk", "object store"])
def test_on_another_machine_a_driver_is_known_by_its_heartbeat(kind: str, tmp_path: Path) -> None:
    remote = (fs.LocalFileSystem(), str(tmp_path / "bucket")) if kind == "object store" else None

    def open_storage(node: str) -> Storage:
        made = Storage(str(tmp_path / "bucket"), remote=remote)
        if remote is not None:
            made.root = tmp_path / node  # each machine has a cache of its own
        return made

    messages: list[str] = []
    with only_driver(open_storage("one"), "s", quiet, beat_s=60.0):
        (claim,) = [path for path in (tmp_path / "bucket" / LEASES).rglob("*") if path.is_file()]
        elsewhere(claim)
        stop = threading.Event()

        def live() -> None:
            count = 1000
            while not stop.wait(0.1):
                count += 1
                aside = tmp_path / "claim"
                aside.write_text(json.dumps({**json.loads(claim.read_text()), "beat": count}))
                aside.replace(claim)

        heart = threading.Thread(target=live)
        heart.start()
        with (
            pytest.raises(ConfigError, match="is being run by process [0-9]+ on other; "),
            only_driver(open_storage("two"), "s", messages.append, beat_s=0.2),
        ):
            pass
        stop.set()
        heart.join()
        assert len(messages) == 1 and "waiting up to 2 s" in messages[0]
        began = time.monotonic()
        with only_driver(open_storage("two"), "s", messages.append, beat_s=0.1):
            assert 0.5 < time.monotonic() - began < 10.0


def test_two_that_start_at_the_same_moment_are_not_both_let_through(tmp_path: Path) -> None:
    remote = (fs.LocalFileSystem(), str(tmp_path / "bucket"))
    for turn in range(5):
        inside: list[int] = []
        done = threading.Barrier(4, timeout=30)

        def start(index: int, inside: list[int] = inside, done: threading.Barrier = done, turn: int = turn) -> None:
            storage = Storage("s3://bucket", remote=remote)
            storage.root = tmp_path / str(index)
            try:
                with only_driver(storage, f"s{turn}", quiet, beat_s=30.0):
                    inside.append(index)
                    done.wait()
            except ConfigError:
                done.wait()

        threads = [threading.Thread(target=start, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(inside) <= 1


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also if the tests run in the background of a shell, which lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_driver_that_was_succeeded_while_it_was_paused_is_interrupted(tmp_path: Path, ctrl_c: None) -> None:
    messages: list[str] = []
    with (
        pytest.raises(KeyboardInterrupt),
        only_driver(Storage(str(tmp_path)), "s", messages.append, beat_s=0.1) as lease,
    ):
        newer = tmp_path / LEASES / "sweep-s.1"
        newer.write_text(json.dumps({"machine": "other/boot", "pid": 1, "started": 1, "token": "another"}))
        time.sleep(5)
    assert len(messages) == 1 and "this one ends" in messages[0]
    assert not lease.is_held() and newer.exists(), "it takes nothing away from its successor"
