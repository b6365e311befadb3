from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mea_ray.core.errors import DataError
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.arrays import load, save_arrays


def drawn() -> Dataset:
    rng = np.random.default_rng(0)
    parts = (
        ImageSet(rng.integers(0, 256, (n, 3, 9, 8), dtype=np.uint8), np.arange(n) % 2, ("a cat", "ö")) for n in (6, 4)
    )
    train, test = parts
    return Dataset("arrays", train, test)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    save_arrays(tmp_path / "d.npz", drawn())
    assert load(path=str(tmp_path / "d.npz")).fingerprint == drawn().fingerprint


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", train_images=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", train_images=np.array([{}], dtype=object))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04broken")
    for name, words in (
        ("few.npz", "lacks train_labels"),
        ("pickled.npz", "lacks|no readable"),
        ("broken.npz", "no readable"),
        ("none.npz", "no readable"),
    ):
        with pytest.raises(DataError, match=words):
            load(path=str(tmp_path / name))
    with pytest.raises(DataError, match="data.path is missing"):
        load()
