from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from pyarrow import fs

from mea_ray.config import ExperimentConfig, Tree, build, merge
from mea_ray.core.errors import ArtifactError, ConfigError, LeaseLost
from mea_ray.experiment import artifacts
from mea_ray.experiment.artifacts import Store, check, read_info
from mea_ray.storage.files import write_whole
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
    assert set(info["files"]) == {"model.safetensors", "config.yaml"}
    weights = info["files"]["model.safetensors"]
    assert weights["bytes"] == 7 and weights["sha256"] == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize("damage", ["truncate", "remove", "no json", "other schema", "no list"])
def test_a_damaged_artifact_is_made_again(tmp_path: Path, config: ExperimentConfig, damage: str) -> None:
    store = Store(str(tmp_path))
    folder = store.get_or_make("victims", "abc", config, _write)
    if damage == "truncate":
        (folder / "model.safetensors").write_text("weig")
    elif damage == "remove":
        (folder / "model.safetensors").unlink()
    elif damage == "no json":
        (folder / "info.json").write_text("{")
    elif damage == "no list":
        (folder / "info.json").write_text(json.dumps({**read_info(folder), "files": {}}))
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


def test_what_lacks_a_file_is_no_artifact(tmp_path: Path, config: ExperimentConfig) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ArtifactError, match="victims abc was made without model.json"):
        store.get_or_make("victims", "abc", config, _write, ["model.safetensors", "model.json"])
    assert list((tmp_path / "artifacts/victims").iterdir()) == []


def _paused_writer(root: str, config: ExperimentConfig, pause: str) -> None:
    """Makes an artifact, and waits at a certain point until the test has stopped and continued this process."""

    def stop_here(point: str) -> None:
        if point == pause:
            (Path(root) / "paused").touch()
            while not (Path(root) / "continue").exists():
                time.sleep(0.01)

    def write(folder: Path) -> Tree:
        stop_here("before it writes")
        write_whole(folder / "model.safetensors", "of the first")
        stop_here("while it writes")
        write_whole(folder / "key.json", "of the first")
        return {}

    publish = artifacts._publish

    def paused_publish(aside: Path, folder: Path) -> None:
        stop_here("before it is named")
        publish(aside, folder)

    artifacts._publish = paused_publish
    store = Store(root, beat_s=0.05, expiry_s=0.5)
    folder = store.get_or_make("victims", "abc", config, write, ["model.safetensors", "key.json"])
    (Path(root) / "got").write_text((folder / "model.safetensors").read_text())


@pytest.mark.parametrize(
    ("pause", "second"),
    [
        ("before it writes", "is still at work"),
        ("while it writes", "finishes first"),
        ("before it is named", "finishes first"),
        ("before it is named", "is still at work"),
    ],
)
def test_a_process_that_was_stopped_spoils_nothing(
    pause: str, second: str, tmp_path: Path, config: ExperimentConfig
) -> None:
    first = SPAWN.Process(target=_paused_writer, args=(str(tmp_path), config, pause))
    first.start()
    wait_for(tmp_path / "paused")
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)

    def go_on() -> None:
        (tmp_path / "continue").touch()
        os.kill(first.pid or 0, signal.SIGCONT)

    def write(folder: Path) -> Tree:
        write_whole(folder / "model.safetensors", "of the second")
        if second == "is still at work":
            go_on()
            time.sleep(0.5)
        write_whole(folder / "key.json", "of the second")
        return {}

    store = Store(str(tmp_path), beat_s=0.05, expiry_s=0.5)
    folder = store.get_or_make("victims", "abc", config, write, ["model.safetensors", "key.json"])
    if second == "finishes first":
        go_on()
    first.join(20)
    assert first.exitcode == 0
    # Both have the same artifact, which is whole, and all of it is of one of them.
    check(folder)
    content = {(folder / name).read_text() for name in ("model.safetensors", "key.json")}
    assert content == {(tmp_path / "got").read_text()} == {"of the second"}
    assert [path.name for path in folder.parent.iterdir()] == ["abc"]
    assert not list((tmp_path / "artifacts/leases").iterdir())


def test_an_artifact_that_was_made_anew_meanwhile_is_not_removed_as_damaged(
    tmp_path: Path, config: ExperimentConfig
) -> None:
    store = Store(str(tmp_path))
    folder = store.get_or_make("victims", "abc", config, _write)
    with pytest.raises(LeaseLost):
        store._remove_damaged("artifacts/victims/abc")
    check(folder)


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
