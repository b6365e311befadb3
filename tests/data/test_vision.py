"""torchvision's datasets: read from small files in the published formats; refused clearly when there are none."""

from __future__ import annotations

import pickle
import struct
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import cifar, stl10, svhn

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.data import DATASETS

NAMES = ["cifar10", "cifar100", "fashion_mnist", "stl10", "svhn"]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("download", [False, True])
def test_missing_files_are_refused_with_folder_and_remedy(name: str, download: bool, tmp_path: Path) -> None:
    folder = tmp_path / "nothing here"
    with pytest.raises(DataError) as caught:
        DATASETS.build(name, root=str(folder), download=download)
    message = str(caught.value)
    assert str(folder) in message and "data.name=digits" in message
    assert ("network" if download else "data.download=true") in message


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_size_is_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size=0"):
        DATASETS.build(name, root=str(tmp_path / "missing"), image_size=0)
    assert not (tmp_path / "missing").exists()


def idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


def test_fashion_mnist(tmp_path: Path) -> None:
    images, labels = RNG.integers(0, 256, (20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        idx(tmp_path / f"FashionMNIST/raw/{part}-images-idx3-ubyte", images)
        idx(tmp_path / f"FashionMNIST/raw/{part}-labels-idx1-ubyte", labels)
    dataset = DATASETS.build("fashion_mnist", root=str(tmp_path))
    assert dataset.train.shape == (1, 28, 28)
    assert np.array_equal(dataset.train.images[:, 0], images)
    assert dataset.test.labels.tolist() == labels.tolist()
    assert dataset.train.class_names[0] == "T-shirt/top"
    assert DATASETS.build("fashion_mnist", root=str(tmp_path), image_size=14).test.shape == (1, 14, 14)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The checksums are the only thing that small files cannot have.
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    dataset_class = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}[name]
    folder = tmp_path / dataset_class.base_folder
    folder.mkdir()
    flat = RNG.integers(0, 256, (4, 3072), np.uint8)
    labels_key = "labels" if classes == 10 else "fine_labels"
    for file, _ in [*dataset_class.train_list, *dataset_class.test_list]:
        (folder / file).write_bytes(pickle.dumps({"data": flat, labels_key: [0, 1, classes - 1, 3]}))
    meta = {dataset_class.meta["key"]: [f"name{i}" for i in range(classes)]}
    (folder / dataset_class.meta["filename"]).write_bytes(pickle.dumps(meta))

    dataset = DATASETS.build(name, root=str(tmp_path), download=False)
    assert dataset.train.images.shape == (4 * len(dataset_class.train_list), 3, 32, 32)
    # The published rows are channel by channel, row by row.
    assert np.array_equal(dataset.test.images, flat.reshape(4, 3, 32, 32))
    assert dataset.test.labels.tolist() == [0, 1, classes - 1, 3]
    assert dataset.test.class_names == tuple(f"name{i}" for i in range(classes))


def test_damaged_cifar_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / cifar.CIFAR10.base_folder
    folder.mkdir()
    for file, _ in [*cifar.CIFAR10.train_list, *cifar.CIFAR10.test_list]:
        (folder / file).write_bytes(b"half a download")
    with pytest.raises(DataError, match="cifar10 cannot be"):
        DATASETS.build("cifar10", root=str(tmp_path))


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svhn, "check_integrity", lambda path, md5=None: Path(path).is_file())
    images = RNG.integers(0, 256, (32, 32, 3, 3), np.uint8)  # height, width, channel, image
    for part in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": np.array([[1], [10], [9]], np.uint8)})
    dataset = DATASETS.build("svhn", root=str(tmp_path), download=False)
    assert dataset.train.labels.tolist() == [1, 0, 9], "the files call the digit 0 class 10"
    assert np.array_equal(dataset.test.images[1], images[..., 1].transpose(2, 0, 1))


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stl10, "check_integrity", lambda path, md5=None: Path(path).is_file())
    folder = tmp_path / stl10.STL10.base_folder
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(f"thing{i}" for i in range(10)))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    stored = RNG.integers(0, 256, (2, 3, 96, 96), np.uint8)  # columns first
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(stored.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 10]))
    dataset = DATASETS.build("stl10", root=str(tmp_path), download=False)
    assert dataset.train.labels.tolist() == [0, 9]
    assert np.array_equal(dataset.train.images, stored.transpose(0, 1, 3, 2))
    assert DATASETS.build("stl10", root=str(tmp_path), image_size=32).train.shape == (3, 32, 32)
