"""Tiny pictures, folders of them, and parquet tables of them. The picture of class k is k bars on a noisy ground."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data import DATASETS


def picture(bars: int, seed: int, size: int = 16, mode: str = "L") -> Image.Image:
    """Draw a picture; the same arguments give the same one."""
    generator = np.random.default_rng(1000 * bars + seed)
    pixels = generator.integers(0, 60, (size, size), dtype=np.uint8)
    for bar in range(1, bars + 1):
        x = bar * (size // (bars + 1))
        pixels[:, x - 1 : x + 1] = 220
    return Image.fromarray(pixels).convert(mode)


def bars_in(image: np.ndarray) -> int:
    """Count the bars of a picture that was read, uint8 (C, H, W)."""
    bright = (image[0].mean(0) > 90).astype(int)
    return int((np.diff(bright) > 0).sum())


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def image_files(folder: Path, count: int = 4, bars: int = 1, suffix: str = ".png", first: int = 0) -> None:
    """Write pictures of one class."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        (folder / f"{seed:03d}{suffix}").write_bytes(encoded(picture(bars, seed)))


def class_folders(root: Path, classes: Iterable[str] = ("a", "b", "c"), count: int = 4, first: int = 0) -> None:
    """Write folders of classes, the first with pictures of one bar, the second of two, ..."""
    for bars, name in enumerate(classes, 1):
        image_files(root / name, count, bars, first=first)


def table(
    path: Path,
    labels: Any,
    *,
    bars: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    images: Sequence[bytes | None] | None = None,
    image: str = "image",
    label: str = "label",
    seed: int = 0,
    **options: Any,
) -> None:
    """Write a parquet file as hubs do, one picture for each label.

    Args:
        path: The file.
        labels: What pyarrow takes as a column; None leaves the column out.
        bars: Bars in each picture; one by default.
        names: Class names in the hub's metadata.
        images: Encoded images instead of drawn ones.
        image: Name of the image column.
        label: Name of the label column.
        seed: Seed of the first picture.
        options: Passed to ``pyarrow.parquet.write_table``.
    """
    count = len(images) if images is not None else len(bars) if bars is not None else len(labels)
    drawn = images or [encoded(picture((bars or [1] * count)[i], seed + i)) for i in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns: dict[str, Any] = {image: pa.array([{"bytes": each, "path": "x"} for each in drawn], kind)}
    if labels is not None:
        columns[label] = labels
    written = pa.table(columns)
    if names is not None:
        features = {label: {"_type": "ClassLabel", "names": list(names)}}
        written = written.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(written, path, **options)


def load(name: str, path: Path | Sequence[Path], **options: Any) -> Dataset:
    """Load a dataset through the table of datasets."""
    where = str(path) if isinstance(path, Path) else [str(each) for each in path]
    loaded: Dataset = DATASETS.build(name, path=where, **options)
    return loaded


def named_labels(part: ImageSet) -> list[str]:
    """Return the class name of each image."""
    return [part.class_names[label] for label in part.labels]
