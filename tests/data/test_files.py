"""One walk decides which files are read: hidden ones, files of the system, links, and suffixes of any case."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_ray.core.errors import DataError
from mea_ray.data import DATASETS
from mea_ray.data.files import SYSTEM_NAMES, existing_folder, walk, without_second_links
from mea_ray.data.skipped import Skipped

PNG = frozenset({".png"})


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def walked_files(root: Path, skipped: Skipped | None = None) -> list[str]:
    return [file.path.relative_to(root).as_posix() for file in walk(root, PNG, skipped or Skipped()).files]


names = st.text("ab.", min_size=1, max_size=4).filter(lambda name: name.strip(".") != "")


@settings(max_examples=40, deadline=None)
@given(paths=st.lists(st.lists(names, min_size=1, max_size=4), max_size=12))
def test_files_below_a_hidden_name_are_never_read(
    paths: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    # Folders and files are told apart by an "f", so that no file lies where another path needs a folder.
    files = {(*folders, f"{name}f.png") for *folders, name in paths}
    for path in files:
        touch(root.joinpath(*path))
    visible = sorted(path for path in files if not any(name.startswith(".") for name in path))
    assert walked_files(root) == ["/".join(path) for path in visible]


@pytest.mark.parametrize("name", [*sorted(SYSTEM_NAMES - {"icon\r"}), "Thumbs.db", "@eaDir", "Desktop.ini"])
def test_folders_of_the_system_are_left_out_at_any_depth_and_counted(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "a" / name / "copy.png")
    touch(tmp_path / name / "copy.png")
    touch(tmp_path / "a" / "1.png")
    skipped = Skipped()
    assert walked_files(tmp_path, skipped) == ["a/1.png"]
    assert skipped["system files and folders"] == 2 and name in str(skipped)


def test_suffixes_are_compared_without_case_and_the_rest_is_counted(tmp_path: Path) -> None:
    for name in ("1.png", "2.PNG", "3.Png", "notes.txt", "more.TXT", "LICENSE", "._1.png"):
        touch(tmp_path / name)
    skipped = Skipped()
    assert walked_files(tmp_path, skipped) == ["1.png", "2.PNG", "3.Png"]
    assert str(skipped) == "1 hidden files and folders (._1.png); 3 files of other types (LICENSE, .txt)"


def test_a_root_with_a_hidden_name_is_read(tmp_path: Path) -> None:
    touch(tmp_path / ".cache" / "set" / "1.png")
    assert walked_files(tmp_path / ".cache" / "set") == ["1.png"]


def test_links_that_lead_back_or_nowhere_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "set"
    touch(root / "a" / "1.png")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "a" / "world").symlink_to("/")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nothing.png")
    (root / "a" / "loop.png").symlink_to(root / "a" / "loop.png")
    skipped = Skipped()
    assert walked_files(root, skipped) == ["a/1.png"]
    assert skipped["links to a folder above them"] == 3
    assert skipped["broken links"] == 2


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    root = tmp_path / "set"
    touch(root / "a" / "1.png")
    touch(root / "b" / "2.png")
    (root / "a" / "x").symlink_to(root / "b")
    (root / "b" / "y").symlink_to(root / "a")
    skipped = Skipped()
    files = without_second_links(walk(root, PNG, skipped).files, skipped)
    assert [file.path.relative_to(root).as_posix() for file in files] == ["a/1.png", "b/2.png"]


def test_links_to_other_places_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "cat" / "1.png")
    touch(tmp_path / "elsewhere" / "dog.png")
    (tmp_path / "set" / "dog").mkdir(parents=True)
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "set" / "dog" / "1.png").symlink_to(tmp_path / "elsewhere" / "dog.png")
    assert walked_files(tmp_path / "set") == ["cat/1.png", "dog/1.png"]


def test_of_a_file_and_links_to_it_the_file_remains(tmp_path: Path) -> None:
    touch(tmp_path / "set" / "z" / "1.png")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "set" / "z")
    (tmp_path / "set" / "m").mkdir()
    (tmp_path / "set" / "m" / "again.png").symlink_to(tmp_path / "set" / "z" / "1.png")
    skipped = Skipped()
    files = without_second_links(walk(tmp_path / "set", PNG, skipped).files, skipped)
    assert [file.path.relative_to(tmp_path / "set").as_posix() for file in files] == ["z/1.png"]
    assert skipped["links to what is read anyway"] == 2


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    skipped = Skipped()
    assert walked_files(tmp_path, skipped) == [] and skipped["sockets, pipes and devices"] == 1


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "locked" / "1.png")
    listing = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read the folder '.*locked': Permission denied; check its permissions"):
        walked_files(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "bad\0name", "x" * 5000, "~nobody-of-this-name/x"])
def test_paths_that_lead_nowhere_are_refused(path: str) -> None:
    with pytest.raises(DataError, match="check data.path"):
        existing_folder(path)


def test_a_warning_counts_skipped_files_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        skipped = Skipped()
        skipped.add("files of other types", ".txt", 12_000)
        skipped.warn(str(tmp_path))
        Skipped().warn(str(tmp_path / "clean"))
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: not read: 12,000 files of other types (.txt)"
    ]


@pytest.mark.parametrize("loader", ["arrays", "parquet", "image_folder", "youtube_faces"])
def test_no_loader_waits_for_a_pipe_or_reads_a_device(loader: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.npz")
    for path in (str(tmp_path / "data.npz"), "/dev/zero"):
        with pytest.raises(DataError, match="it is a pipe, a socket or a device, not a file; check data.path"):
            DATASETS.build(loader, path=path)
