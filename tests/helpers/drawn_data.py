"""Small drawn datasets in every format that the loaders read, for tests that run a whole experiment on them."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image
from torchvision.datasets import cifar, stl10, svhn

Pictures = npt.NDArray[np.uint8]


def draw(
    count: int, classes: int, size: int, channels: int = 3, seed: int = 0
) -> tuple[Pictures, npt.NDArray[np.int64]]:
    """Draw images, uint8 (N, C, H, W), with a bright square at a place of its own for each class, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    images = rng.integers(0, 120, (count, channels, size, size), dtype=np.uint8)
    side = max(size // 4, 2)
    places = np.random.default_rng(99).integers(0, size - side, (classes, 2))
    for image, (top, left) in zip(images, places[labels], strict=True):
        image[:, top : top + side, left : left + side] += 110
    return images, labels


def cifar_files(root: Path, kind: type[cifar.CIFAR10], classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write 20 images of each class, 3 x 32 x 32, into the files of CIFAR-10 or CIFAR-100."""
    # The checksums are the only thing that small files cannot have.
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for index, (file, _) in enumerate([*kind.train_list, *kind.test_list]):
        images, labels = draw(20 * classes, classes, 32, seed=index)
        rows = {"data": images.reshape(len(images), -1), "labels" if classes == 10 else "fine_labels": labels.tolist()}
        (folder / file).write_bytes(pickle.dumps(rows))
    names = {kind.meta["key"]: [f"class {label}" for label in range(classes)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))


def idx_files(root: Path) -> None:
    """Write 200 images, 28 x 28, into the files of Fashion-MNIST."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for index, part in enumerate(("train", "t10k")):
        images, labels = draw(200, 10, 28, 1, index)
        for name, array in ((f"{part}-images-idx3-ubyte", images[:, 0]), (f"{part}-labels-idx1-ubyte", labels)):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / name).write_bytes(header + array.astype(np.uint8).tobytes())


def stl10_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write 200 images, 3 x 96 x 96, into the files of STL-10."""
    monkeypatch.setattr(stl10, "check_integrity", lambda path, md5=None: Path(path).is_file())
    folder = root / stl10.STL10.base_folder
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("\n".join(f"thing{label}" for label in range(10)))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    for index, part in enumerate(("train", "test")):
        images, labels = draw(200, 10, 96, seed=index)
        (folder / f"{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())


def svhn_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write 200 images, 3 x 32 x 32, into the files of SVHN."""
    monkeypatch.setattr(svhn, "check_integrity", lambda path, md5=None: Path(path).is_file())
    root.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(("train", "test")):
        images, labels = draw(200, 10, 32, seed=index)
        named = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": named})


def parquet_files(root: Path) -> None:
    """Write two files of 120 PNG images, 3 x 12 x 12, of four classes."""
    root.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(("train", "test")):
        images, labels = draw(120, 4, 12, seed=index)
        cells = [{"bytes": png(image), "path": f"{place}.png"} for place, image in enumerate(images)]
        pq.write_table(pa.table({"image": cells, "label": labels}), root / f"{part}-00000-of-00001.parquet")


def picture_folders(root: Path) -> None:
    """Write 120 PNG files, 3 x 12 x 12, into a folder for each of four classes, in ``train`` and in ``test``."""
    for index, part in enumerate(("train", "test")):
        for place, (image, label) in enumerate(zip(*draw(120, 4, 12, seed=index), strict=True)):
            path = root / part / f"class{label}" / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))


def array_file(root: Path) -> None:
    """Write 120 images, 3 x 12 x 12, of four classes for each part into ``all.npz``."""
    root.mkdir(parents=True, exist_ok=True)
    parts = {part: draw(120, 4, 12, seed=index) for index, part in enumerate(("train", "test"))}
    images = {f"{part}_images": drawn[0] for part, drawn in parts.items()}
    labels = {f"{part}_labels": drawn[1] for part, drawn in parts.items()}
    names = np.array([f"class{label}" for label in range(4)])
    np.savez(root / "all.npz", **images, **labels, class_names=names)  # type: ignore[arg-type]


def face_folders(root: Path) -> None:
    """Write two videos of 60 frames, 12 x 12, for each of three persons."""
    images, labels = draw(360, 3, 12)
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = root / f"person{label}" / str(place // 3 % 2) / f"{place}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)


def png(image: Pictures) -> bytes:
    """Return an image, uint8 (3, H, W), as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(content, "PNG")
    return content.getvalue()


def written(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write the files of a dataset under ``root``; return the parameters that load them, few images in all."""
    writers: dict[str, Callable[[], None]] = {
        "cifar10": lambda: cifar_files(root, cifar.CIFAR10, 10, monkeypatch),
        "cifar100": lambda: cifar_files(root, cifar.CIFAR100, 100, monkeypatch),
        "fashion_mnist": lambda: idx_files(root),
        "stl10": lambda: stl10_files(root, monkeypatch),
        "svhn": lambda: svhn_files(root, monkeypatch),
        "parquet": lambda: parquet_files(root),
        "arrays": lambda: array_file(root),
        "image_folder": lambda: picture_folders(root),
        "youtube_faces": lambda: face_folders(root),
    }
    small = {"train_images": 120, "test_images": 120, "image_size": 12}
    more: dict[str, dict[str, Any]] = {
        "figures": small,
        "noise": small,
        "mixture": {"parts": [{"name": "figures", **small}, {"name": "noise", **small}]},
        "arrays": {"path": str(root / "all.npz")},
        "image_folder": {"path": str(root), "image_size": 12},
        "parquet": {"path": str(root)},
        "youtube_faces": {"path": str(root), "image_size": 12, "crop": "full"},
    }
    if name in writers:
        writers[name]()
    published = {"root": str(root), "download": False, "image_size": 12} if name in writers else {}
    return more.get(name, published)
