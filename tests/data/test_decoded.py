"""Folders of images that memory does not hold: decoded once into a file, which is mapped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import class_folders, load
from PIL import Image

from mea_ray.attacks.base import Target
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ExperimentConfig, TrainingConfig, build
from mea_ray.core import mapped
from mea_ray.core.errors import DataError
from mea_ray.core.types import Dataset
from mea_ray.data import decode, memory
from mea_ray.experiment.attack_process import parent
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.theft import Theft
from mea_ray.models.build import build_model
from mea_ray.training.engine import train
from mea_ray.training.objective import CrossEntropy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mea_ray" / "images"


@pytest.fixture(params=["grey", "colour"])
def photos(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    class_folders(root, count=12)
    if request.param == "colour":
        Image.new("RGB", (20, 20), (200, 10, 30)).save(root / "b" / "red.png")
    return root


def folder(path: Path, **options: Any) -> Dataset:
    return load("image_folder", path, **{"image_size": 8, **options})


def test_mapped_images_are_those_in_memory(photos: Path, cache: Path) -> None:
    there, here = folder(photos, in_memory=False), folder(photos)
    assert there.fingerprint == here.fingerprint and there.train.shape == here.train.shape
    for one, other in ((there.train, here.train), (there.test, here.test)):
        assert mapped.is_mapped(one.images) and not mapped.is_mapped(other.images)
        assert np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)
    (file,) = cache.iterdir()  # what is half-written or divided has no name
    assert file.suffix == ".npy"


def test_they_are_decoded_once_as_long_as_no_image_changes(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    real = decode.decode_one

    def counted(item: decode.Encoded, image_size: int | None) -> Any:
        decoded.append(item.name)
        return real(item, image_size)

    monkeypatch.setattr(decode, "decode_one", counted)
    first = folder(photos, in_memory=False).fingerprint
    count = len(decoded)
    assert folder(photos, in_memory=False).fingerprint == first and len(decoded) == count
    one, other, *_ = sorted((photos / "c").iterdir())
    shutil.copy(one, other)
    os.utime(other, (1, 1))
    assert folder(photos, in_memory=False).fingerprint == folder(photos).fingerprint
    assert len(decoded) > count and len(list(cache.iterdir())) == 2
    folder(photos, in_memory=False, image_size=10)
    assert len(list(cache.iterdir())) == 3


def test_what_cannot_be_decoded_leaves_no_file(photos: Path, cache: Path) -> None:
    (photos / "b" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1.png"):
        folder(photos, in_memory=False)
    assert not list(cache.iterdir())


def test_a_folder_that_memory_does_not_hold_is_trained_on_and_gives_the_same(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(data: Dataset) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build_model("vgg_like", data.train.shape, 3, {"width": 0.05})
        config = TrainingConfig(epochs=2, batch_size=8, crop_padding=2)
        train(model, data.train.images, data.train.labels, CrossEntropy(), config, seed=1)
        return list(model.state_dict().values())

    expected = weights(folder(photos))
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(DataError, match="data.in_memory=false"):
        folder(photos)
    result = weights(folder(photos, in_memory=False))
    assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


def test_splits_and_the_thiefs_process_map_them_too(photos: Path, tmp_path: Path) -> None:
    def stolen(in_memory: bool) -> tuple[Any, Any]:
        tree = {
            "data": {"name": "image_folder", "path": str(photos), "image_size": 8, "in_memory": in_memory},
            "victim": {"watermark": "none"},
            "thief": {
                "model": {"name": "vgg_like", "width": 0.05},
                "budgets": [16],
                "training": {"epochs": 1, "crop_padding": 2},
            },
        }
        config = build(ExperimentConfig, tree)
        data = load_splits(config)
        torch.manual_seed(0)
        box = LocalBlackBox(build_model("vgg_like", data.shape, data.classes, {"width": 0.05}))
        ((_, rung),) = parent.steal(Theft.of(config, data), [Target(box, TransferSet(tmp_path / str(in_memory)))])
        return data, rung.model

    (there, stolen_there), (here, stolen_here) = stolen(False), stolen(True)
    for name in ("victim_train", "victim_validation", "thief_pool", "verification", "test"):
        one, other = getattr(there, name), getattr(here, name)
        assert mapped.is_mapped(one.images) and np.array_equal(one.images, other.images)
    states = stolen_there.state_dict(), stolen_here.state_dict()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_full_disk_is_reported_before_anything_is_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DataError, match="GiB of disk"):
        folder(photos, in_memory=False)


def test_copies_are_not_taken_for_mapped(tmp_path: Path) -> None:
    images = mapped.scratch(3, (1, 2, 2))
    images[:] = np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)
    assert mapped.is_mapped(images) and mapped.is_mapped(images[1:]) and mapped.is_mapped(np.asarray(images)[:, :1])
    assert not any(map(mapped.is_mapped, (images[[0, 1]], images.copy(), np.array(images), images + 0)))
    taken = mapped.take(images, np.array([2, 0]))
    assert mapped.is_mapped(taken) and taken[:, 0, 0, 0].tolist() == [8, 0]
    assert len(mapped.take(images, np.arange(0))) == 0


def test_processes_share_a_part_until_none_needs_it(photos: Path, cache: Path) -> None:
    images = folder(photos, in_memory=False).train.images
    chosen = np.array([3, 0, 1])
    one, other = mapped.take(images, chosen), mapped.take(images, chosen)
    assert isinstance(one, np.memmap) and isinstance(other, np.memmap)
    assert one.filename == other.filename and not one.flags.writeable
    assert np.array_equal(one, images[chosen]) and np.array_equal(other, images[chosen])
    deeper = mapped.take(one[1:], np.array([1]))
    assert np.array_equal(deeper, images[[1]])
    part = Path(str(one.filename))
    del one
    mapped.take(images, np.array([0]))
    assert part.exists(), "the other array lives"
    del other
    mapped.take(images, np.array([1]))
    assert not part.exists() and deeper.sum() == images[1].sum(dtype=np.int64)


def test_a_part_that_was_left_half_written_is_written_again(photos: Path) -> None:
    images = folder(photos, in_memory=False).train.images
    first = mapped.take(images, np.array([2, 1]))
    assert isinstance(first, np.memmap)
    part = Path(str(first.filename))
    del first
    part.write_bytes(b"0" * 7)
    assert np.array_equal(mapped.take(images, np.array([2, 1])), images[[2, 1]])
