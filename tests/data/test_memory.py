"""Free memory, of the machine or of a container, is looked at before it is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from mea_ray.core.errors import DataError
from mea_ray.data import DATASETS, memory
from mea_ray.data.memory import allocate, check_memory, free_memory
from mea_ray.data.resize import fit


def version_2(folder: Path, limit: str, used: int, cache: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return folder


def test_a_container_may_have_less_than_its_machine(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    assert free_memory(version_2(tmp_path, "5000", 3000, 1000)) == 3000, "cache can be reclaimed"
    assert free_memory(version_2(tmp_path, "5000", 9000, 0)) == 0
    for folder in (version_2(tmp_path, "max", 3000, 0), tmp_path / "nothing"):
        assert 0.5 * machine < free_memory(folder) < 2 * machine
    old = tmp_path / "old"
    (old / "memory").mkdir(parents=True)
    (old / "memory" / "memory.limit_in_bytes").write_text("5000")
    (old / "memory" / "memory.usage_in_bytes").write_text("3000")
    (old / "memory" / "memory.stat").write_text("total_inactive_file 500\n")
    assert free_memory(old) == 2500


def test_what_does_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2**31)
    check_memory("arrays", 2**31, "buy some")
    with pytest.raises(DataError, match=r"^arrays need 3\.0 GiB of memory, 2\.0 GiB are free; buy some$"):
        check_memory("arrays", 3 * 2**30, "buy some")
    assert allocate(4, (3, 2, 5)).shape == (4, 3, 2, 5)
    with pytest.raises(DataError, match="a smaller data.image_size"):
        allocate(10**9, (3, 32, 32))


def test_more_than_an_array_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2**100)
    with pytest.raises(DataError, match="do not fit into memory"):
        allocate(2**62, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("noise", {"train_images": 10**9}),
        ("noise", {"image_size": 4096, "train_images": 3}),
        ("figures", {"train_images": 10**9}),
        ("figures", {"image_size": 4096, "train_images": 12}),
    ],
)
def test_generated_images_are_checked(name: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2**28)
    with pytest.raises(DataError, match="GiB are free; set a smaller data.image_size"):
        DATASETS.build(name, **options)


def test_resized_images_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2**28)
    with pytest.raises(DataError, match="300 images of 1000 x 1000 pixels need 0.3 GiB"):
        fit(np.zeros((300, 1, 8, 8), np.uint8), (1, 1000, 1000))
    with pytest.raises(DataError, match="images of 100000000 x 1000 pixels need"):
        fit(np.zeros((1, 1, 1, 100_000), np.uint8), (1, 1000, 1000))
    with pytest.raises(DataError, match="need 0.3 GiB"):
        fit(np.zeros((1000, 1, 300, 300), np.uint8), (3, 300, 300))
