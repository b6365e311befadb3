"""Datasets that torchvision downloads and reads."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets as published
from filelock import FileLock

from mea_ray.core.errors import DataError
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.options import ImageSize
from mea_ray.data.resize import fit

_ROOT = "~/.cache/mea_ray/datasets"
_STALLED_S = 30.0

_DIGITS = tuple(map(str, range(10)))


def load_cifar10(*, root: str = _ROOT, download: bool = True, image_size: ImageSize | None = None) -> Dataset:
    """Load CIFAR-10: 50,000 train and 10,000 test colour images, 32 x 32 pixels, 10 classes.

    Choose it for the paper's main dataset; it is downloaded.

    Args:
        root: Folder of the published files, or where to download them.
        download: Download missing files.
        image_size: Height and width to resize to, in pixels; null keeps the published size.

    Raises:
        DataError: The files are not there and cannot be downloaded, or are damaged.
    """
    return _cifar("cifar10", published.CIFAR10, root, download, image_size)


def load_cifar100(*, root: str = _ROOT, download: bool = True, image_size: ImageSize | None = None) -> Dataset:
    """Load CIFAR-100: 50,000 train and 10,000 test colour images, 32 x 32 pixels, 100 classes.

    Choose it for many classes; it is downloaded.

    Args:
        root: Folder of the published files, or where to download them.
        download: Download missing files.
        image_size: Height and width to resize to, in pixels; null keeps the published size.

    Raises:
        DataError: The files are not there and cannot be downloaded, or are damaged.
    """
    return _cifar("cifar100", published.CIFAR100, root, download, image_size)


def load_fashion_mnist(*, root: str = _ROOT, download: bool = True, image_size: ImageSize | None = None) -> Dataset:
    """Load Fashion-MNIST: 60,000 train and 10,000 test grey images, 28 x 28 pixels, 10 classes.

    Choose it for grey images of clothes, as in the paper; it is downloaded.

    Args:
        root: Folder of the published files, or where to download them.
        download: Download missing files.
        image_size: Height and width to resize to, in pixels; null keeps the published size.

    Raises:
        DataError: The files are not there and cannot be downloaded, or are damaged.
    """

    def part(train: bool) -> ImageSet:
        data = _open("fashion_mnist", published.FashionMNIST, root, download, train=train)
        return _images(data.data.numpy()[:, None], data.targets.numpy(), tuple(data.classes), image_size)

    return Dataset("fashion_mnist", part(True), part(False))


def load_stl10(*, root: str = _ROOT, download: bool = True, image_size: ImageSize | None = None) -> Dataset:
    """Load the labelled part of STL-10: 5,000 train and 8,000 test colour images, 96 x 96 pixels, 10 classes.

    Choose it for larger photographs with CIFAR-10's classes; it is downloaded.

    Args:
        root: Folder of the published files, or where to download them.
        download: Download missing files.
        image_size: Height and width to resize to, in pixels; null keeps the published size.

    Raises:
        DataError: The files are not there and cannot be downloaded, or are damaged.
    """

    def part(split: str) -> ImageSet:
        data = _open("stl10", published.STL10, root, download, split=split)
        return _images(data.data, data.labels, tuple(data.classes), image_size)

    return Dataset("stl10", part("train"), part("test"))


def load_svhn(*, root: str = _ROOT, download: bool = True, image_size: ImageSize | None = None) -> Dataset:
    """Load SVHN (cropped house numbers): 73,257 train and 26,032 test colour images, 32 x 32 pixels, 10 digits.

    Choose it for photographed digits; it is downloaded.

    Args:
        root: Folder of the published files, or where to download them.
        download: Download missing files.
        image_size: Height and width to resize to, in pixels; null keeps the published size.

    Raises:
        DataError: The files are not there and cannot be downloaded, or are damaged.
    """

    def part(split: str) -> ImageSet:
        data = _open("svhn", published.SVHN, root, download, split=split)
        return _images(data.data, data.labels, _DIGITS, image_size)

    return Dataset("svhn", part("train"), part("test"))


def _cifar(name: str, dataset: Callable[..., Any], root: str, download: bool, image_size: int | None) -> Dataset:
    def part(train: bool) -> ImageSet:
        data = _open(name, dataset, root, download, train=train)
        return _images(data.data.transpose(0, 3, 1, 2), data.targets, tuple(data.classes), image_size)

    return Dataset(name, part(True), part(False))


def _images(images: Any, labels: Any, class_names: tuple[str, ...], image_size: int | None) -> ImageSet:
    pixels = np.ascontiguousarray(images, np.uint8)
    size = image_size or pixels.shape[2]
    resized = fit(pixels, (pixels.shape[1], size, size)) if image_size else pixels
    return ImageSet(resized, np.asarray(labels, np.int64), class_names)


def _open(name: str, dataset: Callable[..., Any], root: str, download: bool, **which: Any) -> Any:
    """Open a dataset of torchvision; download its files first if they are missing and ``download`` is set.

    Processes wait for each other, so that none reads what another is still writing.
    """
    folder = Path(root)
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        # Without write access no process can download, so there is nothing to wait for.
        writable = os.access(folder, os.W_OK)
        with FileLock(folder / f".{name}.lock") if writable else nullcontext():
            return _read_or_download(dataset, folder, download, which)
    except Exception as error:
        # torchvision raises many unrelated types for missing files, damaged files and a missing network.
        action = "check the network, or put" if download else "set data.download=true, or put"
        raise DataError(
            f"{name} cannot be {'read from or downloaded to' if download else 'read from'} {str(folder)!r} "
            f"({type(error).__name__}: {error}); {action} the files that torchvision.datasets.{dataset.__name__} reads "
            "there, or use data.name=parquet, or data.name=digits, which needs no files"
        ) from error


def _read_or_download(dataset: Callable[..., Any], folder: Path, download: bool, which: dict[str, Any]) -> Any:
    try:
        return dataset(str(folder), download=False, **which)
    except (RuntimeError, OSError):
        if not download:
            raise
    before = socket.getdefaulttimeout()
    # torchvision sets no timeout, and a network that drops packets would block for ever.
    socket.setdefaulttimeout(_STALLED_S)
    try:
        return dataset(str(folder), download=True, **which)
    finally:
        socket.setdefaulttimeout(before)
