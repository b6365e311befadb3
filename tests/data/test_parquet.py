"""Image tables in parquet: layouts, columns, labels, and what is refused."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset
from mea_ray.data import DATASETS

CIFAR = os.environ.get("MEA_RAY_CIFAR10", "")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def pixels(count: int, size: int = 9, seed: int = 0, grey: bool = False) -> np.ndarray:
    shape = (count, size, size) if grey else (count, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(
    path: Path,
    images: Sequence[Any],
    labels: Any,
    column: str = "img",
    names: list[str] | None = None,
    binary: bool = False,
) -> None:
    encoded = [image if image is None or isinstance(image, bytes) else png(image) for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = pa.array(encoded, pa.binary()) if binary else pa.array([{"bytes": e, "path": "x"} for e in encoded], kind)
    table = pa.table({column: values, "label": labels})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def load(path: Path | tuple[str, ...], **options: Any) -> Dataset:
    return DATASETS.build("parquet", path=path if isinstance(path, tuple) else str(path), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train-00000-of-00002.parquet", pixels(5, seed=1), [0, 1, 2, 0, 1])
    write(tmp_path / "train-00001-of-00002.parquet", pixels(4, seed=2), [2, 2, 1, 0])
    write(tmp_path / "test-00000-of-00001.parquet", pixels(3, seed=3), [0, 1, 2])
    return tmp_path


def test_shards_are_read_in_order(folder: Path) -> None:
    dataset = load(folder)
    want = np.concatenate([pixels(5, seed=1), pixels(4, seed=2)]).transpose(0, 3, 1, 2)
    assert np.array_equal(dataset.train.images, want)
    assert dataset.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2, 1, 0]
    assert np.array_equal(dataset.test.images, pixels(3, seed=3).transpose(0, 3, 1, 2))
    assert dataset.train.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("plain/train/0000.parquet", "plain/test/0000.parquet"),
        ("snapshots/abc/data/train-00000.parquet", "snapshots/abc/data/validation-00000.parquet"),
        ("train.parquet", "val.parquet"),
    ],
)
def test_hub_layouts(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path / train, pixels(4), [0, 1, 0, 1])
    write(tmp_path / test, pixels(2, seed=5), [0, 1])
    dataset = load(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (4, 2)


def test_files_given_one_by_one(folder: Path) -> None:
    files = (str(folder / "train-00001-of-00002.parquet"), str(folder / "test-00000-of-00001.parquet"))
    dataset = load(files)
    assert (len(dataset.train), len(dataset.test)) == (4, 3)


def test_one_file_is_cut_in_two(tmp_path: Path) -> None:
    write(tmp_path / "all.parquet", pixels(20), [0, 1] * 10)
    with pytest.raises(DataError, match="data.test_fraction"):
        load(tmp_path / "all.parquet")
    dataset = load(tmp_path / "all.parquet", test_fraction=0.3)
    assert np.bincount(dataset.test.labels).tolist() == [3, 3]
    together = {image.tobytes() for part in (dataset.train, dataset.test) for image in part.images}
    assert len(together) == 20


def test_class_names_come_from_the_hubs_metadata(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pixels(3), [0, 1, 0], names=["cat", "dog", "never seen"])
    write(tmp_path / "test.parquet", pixels(1), [1])
    assert load(tmp_path).train.class_names == ("cat", "dog", "never seen")
    assert load(tmp_path, class_names=("a", "b")).train.class_names == ("a", "b")


def test_labels_as_text_in_a_binary_image_column(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pixels(3), ["dog", "cat", "dog"], column="image", binary=True)
    write(tmp_path / "test.parquet", pixels(1), pa.array(["cat"]).dictionary_encode(), column="image")
    dataset = load(tmp_path)
    assert dataset.train.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [1, 0, 1]
    assert dataset.test.labels.tolist() == [0]
    with pytest.raises(DataError, match="'cat' .* not among"):
        load(tmp_path, class_names=("dog", "cow"))


def test_grey_stays_grey_unless_another_image_has_colour(tmp_path: Path) -> None:
    grey = pixels(3, grey=True)
    write(tmp_path / "train.parquet", grey, [0, 1, 0])
    write(tmp_path / "test.parquet", pixels(2, grey=True, seed=4), [0, 1])
    dataset = load(tmp_path)
    assert np.array_equal(dataset.train.images, grey[:, None])
    write(tmp_path / "test.parquet", pixels(2), [0, 1])
    dataset = load(tmp_path)
    assert dataset.train.shape == dataset.test.shape == (3, 9, 9)
    assert np.array_equal(dataset.train.images[:, 2], grey)


def test_sizes_must_agree_or_be_given(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [pixels(1)[0], pixels(1, size=12)[0]], [0, 1])
    write(tmp_path / "test.parquet", pixels(1, size=20), [0])
    with pytest.raises(DataError, match="row 1 of .*train.parquet is 12 x 12 pixels, images before it are 9 x 9"):
        load(tmp_path)
    assert load(tmp_path, image_size=8).test.shape == (3, 8, 8)
    write(tmp_path / "train.parquet", pixels(2), [0, 1])
    with pytest.raises(DataError, match="train images are 9 x 9 pixels, test images 20 x 20"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([b"no image"], [0], "cannot decode row 0 of .*train.parquet"),
        ([png(pixels(1)[0])[:60]], [0], "cannot decode row 0 of .*train.parquet"),
        ([None], [0], "row 0 .* holds no image bytes"),
        ([png(np.zeros((4, 4), np.uint16))], [0], "pixels of mode 'I.*8 bits per channel"),
        (pixels(2), [0.0, 1.0], "are double, they must be integers or strings"),
        (pixels(2), pa.array([0, None]), "row 1 of column 'label' has no label"),
        (pixels(2), [-1, 0], "go from -1 to 1"),
        (pixels(2), ["a", "b"], "integers in some files and strings in others"),
        (np.empty((0, 9, 9, 3), np.uint8), pa.array([], pa.int64()), "has no rows"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, images: Any, labels: Any, message: str) -> None:
    write(tmp_path / "train.parquet", images, labels)
    write(tmp_path / "test.parquet", pixels(2), [0, 1])
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_missing_and_wrong_columns_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no image column 'picture', its columns are img, label; set data.image_column"):
        load(folder, image_column="picture")
    with pytest.raises(DataError, match="no column 'fine_label'.*set data.label_column"):
        load(folder, label_column="fine_label")
    with pytest.raises(DataError, match="column 'label' is int64, it must hold encoded images"):
        load(folder, image_column="label")
    with pytest.raises(DataError, match="go from 0 to 2, with 2 class names"):
        load(folder, class_names=("a", "b"))


def test_bad_paths_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.path is empty"):
        DATASETS.build("parquet")
    with pytest.raises(DataError, match="no file or folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no train-"):
        load(tmp_path / "other")
    (tmp_path / "other" / "train.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(DataError, match="cannot read .*train.parquet as parquet"):
        load(tmp_path / "other", test_fraction=0.5)


def test_a_file_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", pixels(2), [0, 1])
    path = tmp_path / "train.parquet"
    write(path, pixels(40), [0, 1] * 20)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(DataError, match="train.parquet"):
        load(tmp_path)


def test_two_datasets_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    for name in ("small", "large"):
        write(tmp_path / name / "train-0.parquet", pixels(2), [0, 1])
        write(tmp_path / name / "test-0.parquet", pixels(2), [0, 1])
    with pytest.raises(DataError, match="several datasets"):
        load(tmp_path)
    assert len(load(tmp_path / "small").train) == 2


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR, reason="set MEA_RAY_CIFAR10 to the folder of the CIFAR-10 tables")
def test_cifar10_loads_fast_and_whole() -> None:
    start = time.monotonic()
    dataset = load(Path(CIFAR))
    assert time.monotonic() - start < 30
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert dataset.test.images.shape == (10_000, 3, 32, 32)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    mean = dataset.train.images.mean((0, 2, 3), dtype=np.float64) / 255
    assert np.allclose(mean, (0.491, 0.482, 0.447), atol=1e-3)
