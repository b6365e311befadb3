"""The rim: whatever goes wrong below is one line and an exit code, and no traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_results import write_sweep

from mea_ray.cli import commands
from mea_ray.cli.errors import report
from mea_ray.cli.main import main
from mea_ray.cli.options import FAILED, OK, USAGE
from mea_ray.core.errors import ArtifactError, ConfigError, DataError, ServiceUnavailable
from mea_ray.storage.files import write_whole


def as_it_is_printed(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Runs a command whose work raises an error."""

    def run(error: BaseException) -> int:
        def run_sweep(*_: Any, **__: Any) -> bool:
            raise error

        monkeypatch.setattr(commands, "run_sweep", run_sweep)
        return main(["sweep", "quickstart"])

    return run


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("thief.budgets=0 must be positive"), USAGE, "thief.budgets=0 must be positive"),
        (DataError("no images"), USAGE, "no images"),
        (ArtifactError("key.json is damaged; restore it"), USAGE, "key.json is damaged; restore it"),
        (ServiceUnavailable("no answer"), FAILED, "no answer"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), USAGE, "/data/x: Permission denied; choose"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), USAGE, "free some space"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"), USAGE, "a.yaml: No such file"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 400), USAGE, "choose a shorter name"),
        (TimeoutError(), USAGE, "TimeoutError"),
        (OSError("plain words"), USAGE, "plain words"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), USAGE, "save it as UTF-8"),
        (RecursionError("maximum recursion depth exceeded"), USAGE, "nested too deeply"),
        (OverflowError("int too large to convert to float"), USAGE, "int too large to convert to float"),
        (MemoryError(), USAGE, "not enough memory"),
        (MemoryError("Unable to allocate 9. TiB"), USAGE, "Unable to allocate 9. TiB"),
    ],
)
def test_an_error_is_one_line(
    error: Exception, code: int, words: str, fail: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(error) == code
    output = capsys.readouterr()
    printed = as_it_is_printed(output.err)
    assert words in printed and "Traceback" not in printed and "bug" not in printed and output.out == ""


def test_a_bug_says_so_and_how_to_see_more(
    fail: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail(ZeroDivisionError("division by zero")) == FAILED
    output = as_it_is_printed(capsys.readouterr().err)
    assert "this is a bug in mea_ray: ZeroDivisionError: division by zero" in output and "--debug" in output
    with pytest.raises(ZeroDivisionError):
        main(["sweep", "quickstart", "--debug"])


def test_an_actors_error_is_shown_without_rays_wrapping(
    fail: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("a long remote traceback")
    error.cause = PermissionError(errno.EACCES, "Permission denied", "/data/x")  # type: ignore[attr-defined]
    assert fail(error) == USAGE
    output = as_it_is_printed(capsys.readouterr().err)
    assert "/data/x: Permission denied" in output and "remote traceback" not in output


def test_an_error_of_rays_own_is_one_line() -> None:
    from ray.exceptions import RayError

    visible = report(RayError("The node was lost.\nstate dump\nmore"))
    assert (visible.text, visible.code, visible.is_bug) == (
        "Ray failed: The node was lost.; --debug shows everything",
        FAILED,
        False,
    )


@pytest.mark.parametrize("verb", ["report", "status", "sync"])
def test_what_is_not_a_sweeps_folder_is_refused_in_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong" / "results").mkdir(parents=True)
    (tmp_path / "wrong" / "plan.json").write_text("[]")
    (tmp_path / "wrong" / "results" / "a.json").write_bytes(b"\xff\xfe")
    for name in ("missing", "file.json", "empty", "wrong", "wrong/results/a.json", "a\x00b", "n" * 300):
        code = main([verb, str(tmp_path / name)])
        output = capsys.readouterr()
        printed = as_it_is_printed(output.err)
        if (verb, name) == ("sync", "wrong"):  # nothing was kept offline there
            assert code == OK
            continue
        assert code == USAGE, (name, printed)
        assert "Traceback" not in printed and "bug" not in printed and printed.count("Error: ") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_a_folder_that_cannot_be_read_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path / "sweep")
    (tmp_path / "sweep").chmod(0o500)
    assert main(["report", str(tmp_path / "sweep")]) == USAGE
    assert "Permission denied" in as_it_is_printed(capsys.readouterr().err)
    (tmp_path / "sweep" / "results").chmod(0)
    assert main(["report", str(tmp_path / "sweep")]) == USAGE


def test_a_report_whose_folder_is_a_file_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path, 1)
    (tmp_path / "report.html").mkdir()
    assert main(["report", str(tmp_path)]) == USAGE
    assert str(tmp_path) in as_it_is_printed(capsys.readouterr().err)
    assert not list(tmp_path.glob(".report*"))


def test_records_and_pages_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path / "s")
    (tmp_path / "file").write_text("x")
    assert main(["report", str(tmp_path / "s"), "--record", str(tmp_path / "file" / "r"), "--command", "x"]) == USAGE
    assert main(["report", str(tmp_path / "s"), "--record", str(tmp_path / "file"), "--command", "x"]) == USAGE
    assert main(["report", str(tmp_path), "--page", str(tmp_path / "missing.md")]) == USAGE
    assert main(["report", str(tmp_path), "--page", str(tmp_path)]) == USAGE
    assert main(["report", str(tmp_path / "s"), "--png", str(tmp_path / "file" / "x.png")]) == USAGE
    assert "Traceback" not in capsys.readouterr().err


def test_a_limit_on_the_size_of_files_names_the_file_and_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "model.safetensors", b"weights")
    described = report(caught.value)
    assert described.code == USAGE and not list(tmp_path.iterdir())
    assert described.text.startswith(
        f"{tmp_path}/model.safetensors: File too large; raise the limit on the size of files"
    )
