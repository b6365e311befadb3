"""A relative storage path means the driver's working directory, in whichever process it is used."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mea_ray.storage.remote import Storage
from mea_ray.sweep.folder import SweepFolder


@pytest.mark.parametrize("location", ["kept", "./kept"])
def test_a_relative_storage_survives_a_change_of_directory(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    folder, storage = SweepFolder(location, "s"), Storage(location)
    sent = pickle.dumps((folder, storage))
    monkeypatch.chdir(tmp_path / "elsewhere")  # where Tune puts a trial
    folder_there, storage_there = pickle.loads(sent)
    assert folder_there.path == folder.path == tmp_path / "kept" / "s"
    assert storage_there.root == storage.root == Storage(storage.location).root
