from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs

from mea_ray.config import ExperimentConfig, Tree, build, merge
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.experiment.artifacts import Store, check, read_info
from mea_ray.storage.lease import Lease
from mea_ray.storage.remote import Storage

SPAWN = multiprocessing.get_context("spawn")


def experiment(**settings: object) -> ExperimentConfig:
    return build(ExperimentConfig, merge({}, {key.replace("__", "."): value for key, value in settings.items()}))


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return experiment()


def _write(folder: Path, text: str = "weights") -> Tree:
    (folder / "model.safetensors").write_text(text)
    return {"epochs": 3}


def _slow_writer(root: str, log: str, config: ExperimentConfig) -> None:
    def write(folder: Path) -> Tree:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return _write(folder)

    Store(root).get_or_make("victims", "abc", config, write)


def _hold_forever(folder: str) -> None:
    Lease(Path(folder), "x", beat_s=0.05).acquire()
    (Path(folder) / "held").touch()
    time.sleep(60)


def wait_for(path: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_four_processes_want_one_victim_and_one_trains_it(tmp_path: Path, config: ExperimentConfig) -> None:
    log = tmp_path / "log"
    # The config travels ready made: a process that builds one imports torch, for which there is no need here.
    workers = [SPAWN.Process(target=_slow_writer, args=(str(tmp_path), str(log), config)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert len(log.read_text().split()) == 1
    check(tmp_path / "artifacts/victims/abc")
    assert not list((tmp_path / "artifacts/leases").iterdir())


def test_an_artifact_says_how_it_was_made(tmp_path: Path, config: ExperimentConfig) -> None:
    folder = Store(str(tmp_path)).get_or_make("victims", "abc", config, _write)
    info = read_info(folder)
    assert info["name"] == "abc" and info["seed"] == 0 and info["epochs"] == 3 and "torch" in info["versions"]
    assert set(info["sha256"]) == {"model.safetensors", "config.yaml"}


@pytest.mark.parametrize("damage", ["truncate", "remove", "no json", "other schema"])
def test_a_damaged_artifact_is_made_again(tmp_path: Path, config: ExperimentConfig, damage: str) -> None:
    store = Store(str(tmp_path))
    folder = store.get_or_make("victims", "abc", config, _write)
    if damage == "truncate":
        (folder / "model.safetensors").write_text("weig")
    elif damage == "remove":
        (folder / "model.safetensors").unlink()
    elif damage == "no json":
        (folder / "info.json").write_text("{")
    else:
        (folder / "info.json").write_text(json.dumps({**read_info(folder), "schema_version": 99}))
    with pytest.raises(ArtifactError, match="delete"):
        store.find("victims", "abc")
    again = store.get_or_make("victims", "abc", config, lambda folder: _write(folder, "again"))
    assert again == folder and (folder / "model.safetensors").read_text() == "again"


def test_a_failed_training_leaves_nothing_behind_and_the_next_may_try(tmp_path: Path, config: ExperimentConfig) -> None:
    store = Store(str(tmp_path))

    def fail(folder: Path) -> Tree:
        _write(folder)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.get_or_make("victims", "abc", config, fail)
    assert list((tmp_path / "artifacts/victims").iterdir()) == []
    assert store.get_or_make("victims", "abc", config, _write).is_dir()


def test_a_killed_holder_loses_its_lease(tmp_path: Path) -> None:
    holder = SPAWN.Process(target=_hold_forever, args=(str(tmp_path),))
    holder.start()
    wait_for(tmp_path / "held")
    waiter = Lease(tmp_path, "x", expiry_s=30)
    assert not waiter.try_acquire()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert waiter.acquire(poll_s=0.01)
    waiter.release()


def test_a_holder_on_another_machine_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    (tmp_path / "x.0").write_text(json.dumps({"machine": "elsewhere", "pid": 1, "started": 0}))
    waiter = Lease(tmp_path, "x", beat_s=0.05, expiry_s=0.4)
    for _ in range(12):  # 0.6 s of heartbeats, longer than the expiry
        os.utime(tmp_path / "x.0")
        assert not waiter.try_acquire()
        time.sleep(0.05)
    started = time.monotonic()
    assert waiter.acquire(poll_s=0.02)
    assert 0.3 < time.monotonic() - started < 5
    waiter.release()


def test_a_holder_that_works_long_keeps_its_lease_and_only_one_of_many_waiters_takes_over(tmp_path: Path) -> None:
    holder = Lease(tmp_path, "x", beat_s=0.05, expiry_s=0.5)
    assert holder.try_acquire()
    (tmp_path / "x.0").write_text(json.dumps({"machine": "elsewhere", "pid": 1, "started": 0}))
    waiters = [Lease(tmp_path, "x", beat_s=0.05, expiry_s=0.5) for _ in range(4)]
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        assert not any(waiter.try_acquire() for waiter in waiters)
        time.sleep(0.05)
    holder._stop.set()  # as if it had died
    won: list[Lease] = []
    threads = [
        threading.Thread(target=lambda w=w: w.acquire(give_up=lambda: bool(won), poll_s=0.01) and won.append(w))
        for w in waiters
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_remote_storage_is_filled_and_read_back_by_another_node(
    tmp_path: Path, config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = (fs.LocalFileSystem(), str(tmp_path / "bucket"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node1"))
    folder = Store(Storage("s3://bucket", remote=remote)).get_or_make("victims", "abc", config, _write)
    assert folder.is_relative_to(tmp_path / "node1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node2"))
    there = Store(Storage("s3://bucket", remote=remote))
    fetched = there.get_or_make("victims", "abc", config, lambda folder: pytest.fail("trained again"))
    assert fetched.is_relative_to(tmp_path / "node2")
    assert (fetched / "model.safetensors").read_text() == "weights"
    # Without its last file an upload that was cut short does not count.
    (tmp_path / "bucket/artifacts/victims/abc/info.json").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node3"))
    assert Store(Storage("s3://bucket", remote=remote)).find("victims", "abc") is None


def test_a_storage_that_no_file_system_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="storage='what://is/this'.*give a folder"):
        Storage("what://is/this")


def test_a_file_uri_is_the_folder_itself(tmp_path: Path) -> None:
    assert Storage(f"file://{tmp_path}").root == tmp_path
