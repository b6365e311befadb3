"""A storage that cannot be written is refused in one line, before Ray starts or any work begins."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs
from tiny import tiny_sweep

from mea_ray import api
from mea_ray.calibration import run as calibration
from mea_ray.cli.main import main
from mea_ray.cli.options import USAGE
from mea_ray.config import write_yaml
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.victim import Victim
from mea_ray.storage.files import try_writing
from mea_ray.storage.remote import Storage
from mea_ray.sweep import cluster
from mea_ray.sweep.runner import run_sweep


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """An experiment and a sweep."""
    sweep = tiny_sweep(tmp_path / "unused")
    write_yaml(sweep.base, tmp_path / "one.yaml")
    write_yaml(sweep, tmp_path / "many.yaml")
    (tmp_path / "file").write_text("mine")
    return {"one": str(tmp_path / "one.yaml"), "many": str(tmp_path / "many.yaml"), "file": str(tmp_path / "file")}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "ray_cluster", never)


COMMANDS = {
    "run": ["run", "{one}"],
    "run --local": ["run", "{one}", "--local"],
    "sweep": ["sweep", "{many}"],
    "calibrate": ["calibrate", "{one}"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("storage", ["/proc/nope", "/dev/null/x", "{file}", "{file}/x", "/tmp/" + "x" * 300])
def test_each_command_says_so_in_one_line(
    command: str, storage: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = storage.format(**files)
    argv = [part.format(**files) for part in COMMANDS[command]]
    assert main([*argv[:2], f"storage={storage}", *argv[2:]]) == 2
    output = " ".join(capsys.readouterr().err.replace("│", " ").split()).replace(" ", "")
    assert f"storage={storage}cannotbewritten:" in output and "giveanother(storage=...)" in output, output
    assert Path(files["file"]).read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync"])
def test_whatever_the_reason_nothing_is_left(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "storage"

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(cluster, "check_address", lambda address: None)
        broken.setattr(os if call == "fsync" else Path, call, refuse)
        with pytest.raises(ConfigError, match=f"cannot be written: {os.strerror(number)}; give another"):
            run_sweep(tiny_sweep(storage))
        with pytest.raises(ConfigError, match=f"cannot be written: {os.strerror(number)}; give another"):
            Storage(str(storage)).check_writable()
    assert not storage.exists()


def test_a_storage_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    Storage(str(tmp_path / "a" / "b")).check_writable()
    assert list(tmp_path.iterdir()) == []
    remote = (fs.LocalFileSystem(), str(tmp_path / "bucket"))
    Storage("s3://bucket", remote=remote).check_writable()
    assert not list((tmp_path / "bucket").iterdir())


def test_an_object_store_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "bucket").write_text("a file")
    remote = (fs.LocalFileSystem(), str(tmp_path / "bucket"))
    with pytest.raises(ConfigError, match="storage=s3://bucket cannot be written: .*give another"):
        Storage("s3://bucket", remote=remote).check_writable()


@pytest.mark.parametrize("name", [os.fsdecode(b"/tmp/\xff"), "/tmp/\0"], ids=["not UTF-8", "zero byte"])
def test_a_name_that_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^storage=.*give another"):
        Storage(name)


def test_reading_commands_say_so_in_one_line(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (files["file"], "/proc/nope", "/tmp/" + "x" * 300):
        assert main(["status", folder]) == 2
        assert "folder that `mea-ray sweep` printed" in " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert main(["report", folder]) in {1, 2}


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    try_writing(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Not a directory|File exists"):
        try_writing(tmp_path / "file" / "a")


@pytest.mark.parametrize("place", ["/proc/nope/x", "{}/file/x"], ids=["read-only", "below a file"])
def test_what_is_written_at_the_end_is_tried_at_the_start(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of a victim, of a verdict, and of a record: hours of work, or queries that were paid for."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "e.yaml").write_text(f"storage: {tmp_path / 'storage'}\n")
    victim = SimpleNamespace(require_folder=lambda: tmp_path)
    monkeypatch.setattr(Victim, "load", lambda folder: victim)
    for module, work in ((api, "watermark"), (api, "verify"), (calibration, "calibrate")):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("it was begun"))
    place, experiment = place.format(tmp_path), str(tmp_path / "e.yaml")
    for command in (
        ["train", experiment, "--to", place],
        ["verify", str(tmp_path), "--suspect", "x", "--to", place],
        ["calibrate", experiment, "--record", place],
    ):
        assert main(command) == USAGE
        shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "cannot be written" in shown and "another folder" in shown
    assert {path.name for path in tmp_path.iterdir()} <= {"e.yaml", "file"}
