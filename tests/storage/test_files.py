from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from mea_ray.core.errors import StorageUnavailable
from mea_ray.storage.files import PATIENCE, patiently, write_whole


def test_nobody_waits_who_did_not_say_so(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        patiently(full, tmp_path)


def test_a_full_disk_is_waited_for_and_reported_once(tmp_path: Path) -> None:
    messages: list[str] = []
    tries: list[int] = []

    def work() -> str:
        tries.append(1)
        if len(tries) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "done"

    with PATIENCE.during(30, None, messages.append):
        assert patiently(work, tmp_path / "file") == "done"
    assert messages == [
        f"storage {tmp_path} is full; waiting for it up to 30 s",
        f"storage {tmp_path} takes files again; going on",
    ]


def test_patience_ends_with_what_to_do(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        PATIENCE.during(0.2, None, lambda text: None),
        pytest.raises(StorageUnavailable, match=r"is full .*free some space.*--resume"),
    ):
        patiently(full, tmp_path)


def test_a_storage_that_was_taken_away_is_not_begun_anew(tmp_path: Path) -> None:
    storage, elsewhere = tmp_path / "storage", tmp_path / "elsewhere"
    storage.mkdir()
    (storage / "marker").touch()
    messages: list[str] = []
    storage.rename(elsewhere)

    def bring_back() -> None:
        time.sleep(0.5)
        assert not storage.exists(), "somebody wrote where the storage was"
        elsewhere.rename(storage)

    back = threading.Thread(target=bring_back)
    with PATIENCE.during(30, storage / "marker", messages.append):
        back.start()
        write_whole(storage / "folder" / "file", "text")
        back.join()
        # A file that is missing while the storage is there is simply missing.
        with pytest.raises(FileNotFoundError):
            patiently((storage / "none").read_bytes, storage)
    assert (storage / "folder" / "file").read_text() == "text" and "is away" in messages[0]
    assert [path.name for path in (storage / "folder").iterdir()] == ["file"]


def test_an_error_that_does_not_pass_is_raised_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with PATIENCE.during(30, None, lambda text: None), pytest.raises(OSError):
        write_whole(tmp_path / "file" / "below", b"")
