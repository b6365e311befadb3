"""Image tables in parquet: layouts, columns, labels, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import bars_in, encoded, named_labels, picture, table
from PIL import Image

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset
from mea_ray.data import DATASETS, memory
from mea_ray.data.splits import make_splits

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
    images: Sequence[Any] | np.ndarray,
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
    built: Dataset = DATASETS.build("parquet", path=path if isinstance(path, tuple) else str(path), **options)
    return built


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
        make_splits(load(tmp_path / "all.parquet"))
    dataset = load(tmp_path / "all.parquet", test_fraction=0.3)
    assert np.bincount(dataset.test.labels).tolist() == [3, 3]
    together = {image.tobytes() for part in (dataset.train, dataset.test) for image in part.images}
    assert len(together) == 20


def test_class_names_come_from_the_hubs_metadata(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", pixels(3), [0, 1, 0], names=["cat", "dog", "never seen"])
    write(tmp_path / "test.parquet", pixels(1), [1])
    assert load(tmp_path).train.class_names == ("cat", "dog"), "a class without an image is none"
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
        (pixels(2), [0.5, 1.0], "are double, they must be integers or strings"),
        (pixels(2), pa.array([0, None]), "1 of the 2 rows of .*train.parquet have no label"),
        (pixels(2), [-1, 0], "1 of the 2 rows of .*train.parquet have no label"),
        (pixels(2), [-3, 0], "has the label -3; labels are 0 or more"),
        (pixels(2), ["a", "b"], "integers in some files and strings in others"),
        (np.empty((0, 9, 9, 3), np.uint8), pa.array([], pa.int64()), "has no rows"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, images: Any, labels: Any, message: str) -> None:
    write(tmp_path / "train.parquet", images, labels)
    write(tmp_path / "test.parquet", pixels(2), [0, 1])
    with pytest.raises(DataError, match=message):
        make_splits(load(tmp_path))


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
    with pytest.raises(DataError, match="there are no parquet files in"):
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


def test_what_git_lfs_has_not_downloaded_is_named(tmp_path: Path) -> None:
    pointer = tmp_path / "train.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=r"train\.parquet is a pointer of Git LFS; run `git lfs pull`"):
        load(tmp_path)


def test_two_datasets_in_one_folder_are_distinguished(tmp_path: Path) -> None:
    for name in ("small", "large"):
        write(tmp_path / name / "train-0.parquet", pixels(2), [0, 1])
        write(tmp_path / name / "test-0.parquet", pixels(2), [0, 1])
    with pytest.raises(DataError, match="several datasets"):
        load(tmp_path)
    assert len(load(tmp_path / "small").train) == 2


def right(dataset: Dataset, names: str = "xyz") -> bool:
    """Whether each image carries the name of its class: x has one bar, y two, z three."""
    parts = (dataset.train, dataset.test)
    return all(
        names.index(name) + 1 == bars_in(image)
        for part in parts
        for name, image in zip(named_labels(part), part.images, strict=True)
    )


def test_each_file_says_what_its_numbers_mean(tmp_path: Path) -> None:
    table(tmp_path / "train-00000-of-00002.parquet", [0, 1, 2] * 4, bars=[1, 2, 3] * 4, names="xyz")
    table(tmp_path / "train-00001-of-00002.parquet", [0, 1, 2] * 4, bars=[3, 1, 2] * 4, names="zxy", seed=50)
    table(tmp_path / "test-00000-of-00001.parquet", [0, 1, 2] * 4, bars=[2, 3, 1] * 4, names="yzx", seed=99)
    dataset = load(tmp_path)
    assert dataset.train.class_names == ("x", "y", "z") and right(dataset)
    assert right(load(tmp_path, class_names=("z", "y", "x"))), "the config's order is one of names, too"
    texts = [{1: "x", 2: "y", 3: "z"}[bars] for bars in [2, 3, 1] * 4]
    table(tmp_path / "test-00000-of-00001.parquet", texts, bars=[2, 3, 1] * 4, seed=99)
    assert right(load(tmp_path)), "strings agree with named numbers"


def test_labels_from_one_on_or_with_gaps_make_whole_experiments(tmp_path: Path) -> None:
    for labels, names in (([1, 2, 3], ("1", "2", "3")), ([0, 5, 2**62], ("0", "5", str(2**62)))):
        table(tmp_path / "train.parquet", labels * 4)
        table(tmp_path / "test.parquet", labels * 2, seed=50)
        splits = make_splits(load(tmp_path))
        assert splits.victim_train.class_names == names
        assert set(splits.victim_train.labels.tolist()) == {0, 1, 2}


def test_validation_stands_in_for_a_test_part_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path / "train.parquet", [0, 1] * 4)
    table(tmp_path / "validation.parquet", [0, 1] * 2, seed=50)
    for labels in ([-1] * 6, None):
        table(tmp_path / "test.parquet", labels, bars=[1] * 6, seed=80)
        dataset = load(tmp_path)
        assert len(dataset.test) == 4 and not dataset.pool_only
    assert "validation.parquet is the test part instead" in caplog.text
    (tmp_path / "validation.parquet").unlink()
    with pytest.raises(DataError, match="or set data.test_fraction to cut test off train"):
        make_splits(load(tmp_path))
    assert len(load(tmp_path, test_fraction=0.5).test) == 4


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train.parquet", "TEST.parquet"),
        ("TRAINING-0.PARQUET", "Testing-0.parquet"),
        ("data/Train/0000.parquet", "data/Val/0000.parquet"),
        ("seg_train/a.parquet", "seg_test/a.parquet"),
        ("train.parquet/part-0.snappy.parquet", "test.parquet/part-0.snappy.parquet"),
        ("cifar10_train-00000-of-00001.parquet", "cifar10_test-00000-of-00001.parquet"),
        ("train-00000-of-00001-5b3e9d0fade1.parquet", "test-00000-of-00001-0a1b2c3d4e5f.parquet"),
        ("train_images.pq", "test_images.pq"),
    ],
)
def test_parts_by_whatever_name(tmp_path: Path, train: str, test: str) -> None:
    table(tmp_path / train, [0, 1] * 2)
    table(tmp_path / test, [0, 1], seed=50)
    dataset = load(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (4, 2)


def test_the_cache_of_a_hub_with_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "data"
    snapshot.mkdir(parents=True)
    for number, part in enumerate(("train", "test")):
        table(blobs / part, [0, 1] * 2, seed=50 * number)
        (snapshot / f"{part}-00000-of-00001.parquet").symlink_to(Path("../../../blobs") / part)
    assert len(load(tmp_path).train) == 4


def test_hidden_and_foreign_files_are_left_out_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".cache/train-0.parquet", "._train-00000-of-00002.parquet", "@eaDir/x.parquet", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"junk")
    write(folder / "unsupervised-0.parquet", pixels(2, seed=9), [-1, -1])
    assert len(load(folder).train) == 9
    assert "2 hidden files and folders (._train-00000-of-00002.parquet, .cache)" in caplog.text
    assert "1 files of other types (.md)" in caplog.text and "1 files of no part (unsupervised-0" in caplog.text


def test_missing_shards_are_refused_unless_the_files_are_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in (0, 2, 4):
        table(tmp_path / f"data/train-{index:05d}-of-00005.parquet", [0, 1, 2] * 4, seed=20 * index)
    table(tmp_path / "data/test-00000-of-00001.parquet", [0, 1, 2] * 4, seed=200)
    with pytest.raises(DataError, match=r"3 of the 5 files train-\*-of-00005 .*; 00001 and 00003 are missing"):
        load(tmp_path)
    listed = tuple(str(path) for path in sorted((tmp_path / "data").iterdir()))
    assert len(load(listed).train) == 36 and len(load(listed[1:2], test_fraction=0.5).train) == 6
    assert "00001 and 00003 are missing; they are read as they are listed" in caplog.text
    assert "1 of the 5 files train-*-of-00005" in caplog.text


def test_the_same_image_in_both_parts_causes_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path / "train.parquet", [0, 0, 0])
    table(tmp_path / "test.parquet", [0, 0], seed=2)
    load(tmp_path)
    assert "1 different images in test are in train, too" in caplog.text


def bomb(path: Path, rows: int, image: bytes) -> Path:
    """Write a file of a few kilobytes that stores one image once, for all its rows."""
    stored = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([image]))
    images = pa.StructArray.from_arrays([stored], ["bytes"])
    written = pa.table({"image": images, "label": pa.array(np.arange(rows) % 2)})
    pq.write_table(written, path, compression="zstd", dictionary_pagesize_limit=2**24, store_schema=False)
    assert path.stat().st_size < 100_000
    return path


def taken(path: Path, **options: Any) -> tuple[str, int]:
    """Load a file; return the images' shape or the refusal, and the most memory that it took, in MiB."""
    tracemalloc.start()
    try:
        result = str(load(path, test_fraction=0.5, **options).train.images.shape)
    except DataError as error:
        result = str(error)
    peak = tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory()
    tracemalloc.stop()
    return result, peak // 2**20


def test_small_files_do_not_become_gigabytes(tmp_path: Path) -> None:
    large = bomb(tmp_path / "large.parquet", 3000, encoded(Image.new("L", (1000, 1000))))
    many = bomb(tmp_path / "many.parquet", 2_000_000, encoded(Image.new("L", (64, 64))))
    for path, needed in ((large, "8.4 GiB"), (many, "22.9 GiB")):
        printed, peak = taken(path)
        assert needed in printed and "set a smaller data.image_size" in printed and peak < 300
    padded = bomb(tmp_path / "padded.parquet", 400, encoded(picture(1, 0)) + bytes(2_000_000))
    printed, peak = taken(padded, image_size=8)
    assert printed == "(200, 1, 8, 8)" and peak < 400, "its images with their padding are 800 MiB"


@pytest.mark.parametrize("label", [2**62, -(2**62)])
def test_a_huge_label_allocates_nothing(tmp_path: Path, label: int) -> None:
    table(tmp_path / "train.parquet", [0, 0, label, label])
    table(tmp_path / "test.parquet", [0, label], seed=50)
    if label < 0:
        with pytest.raises(DataError, match="has the label -4611686018427387904"):
            load(tmp_path)
    else:
        assert load(tmp_path).train.class_names == ("0", str(label))


def test_memory_is_checked_before_labels_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 2200)
    with pytest.raises(DataError, match=r"the 9 images of 9 x 9 pixels in .* need .*; set a smaller data.image_size"):
        load(folder)


def test_doubled_columns_and_broken_metadata(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1] * 2)
    written = pq.read_table(tmp_path / "train.parquet")
    for column in ("image", "label"):
        doubled = pa.table([*written.columns, written.column(column)], names=[*written.column_names, column])
        pq.write_table(doubled, tmp_path / "train.parquet")
        with pytest.raises(DataError, match=f"has several columns '{column}'"):
            load(tmp_path, test_fraction=0.5)
    for metadata in ("[" * 100_000, "{", '{"info": 3}', '{"info": {"features": {"label": {"names": "xy"}}}}'):
        pq.write_table(written.replace_schema_metadata({"huggingface": metadata}), tmp_path / "train.parquet")
        assert load(tmp_path, test_fraction=0.5).train.class_names == ("0", "1")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_but_never_fail_otherwise(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged" / "all.parquet"
    table(path, [0, 1] * 3, names=["a", "b"])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the damage in the metadata at the end, which decides what is read.
        first = data.draw(st.sampled_from([0, len(content) - 900]))
        content[data.draw(st.integers(first, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load(path, test_fraction=0.5)
    except DataError as error:
        assert str(path.parent) in str(error) or "label" in str(error)


def test_unused_categories_are_no_classes(tmp_path: Path) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([2, 0, 2, 0]), pa.array(["dog", "eel", "cat"]))
    table(tmp_path / "train.parquet", labels)
    assert load(tmp_path, test_fraction=0.5).train.class_names == ("cat", "dog")


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


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pa.array([1.0, 0.0, 2.0, 1.0]), "1021"),
        (pa.array(np.array([1, 0, 2, 1], np.float16)), "1021"),
        (pa.array([Decimal("1"), Decimal("0"), Decimal("2"), Decimal("1")]), "1021"),
        (pa.array([True, False, True, True]), "1011"),
        (pa.array([b"1", b"0", b"2", b"1"]), "1021"),
        (pa.array([b"1", b"0", b"2", b"1"], pa.large_binary()), "1021"),
        (pa.array([b"1", b"0", b"2", b"1"], pa.binary(1)), "1021"),
        (pa.array([1, 0, 2, 1], pa.uint8()).dictionary_encode(), "1021"),
        (pa.array([1.0, 0.0, 2.0, 1.0]).dictionary_encode(), "1021"),
        (pa.array(["1", "0", "2", "1"], pa.large_string()), "1021"),
    ],
    ids=lambda value: str(getattr(value, "type", value))[:30],
)
def test_labels_in_whatever_type(tmp_path: Path, labels: pa.Array, names: str) -> None:
    table(tmp_path / "train.parquet", labels)
    assert "".join(named_labels(load(tmp_path).train)) == names


def test_a_missing_label_in_a_column_of_floats(tmp_path: Path) -> None:
    """What pandas makes of whole numbers as soon as one of them is missing."""
    table(tmp_path / "train.parquet", pa.array([1.0, float("nan"), 0.0, None]))
    dataset = load(tmp_path)
    assert dataset.train.labels.tolist() == [1, -1, 0, -1] and "2 of the 4 rows" in dataset.pool_only


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([0.5, 1.0, 0.0, 1.0]),
        pa.array([float("inf"), 1.0, 0.0, 1.0]),
        pa.array([Decimal("0.5")] * 4),
        pa.array([b"\xff"] * 4),
        pa.array([[0, 1]] * 4),
        pa.array([{"a": 1}] * 4),
        pa.array([datetime(2026, 1, 1)] * 4),
    ],
    ids=lambda value: str(value.type)[:20],
)
def test_a_column_that_cannot_be_labels_is_never_passed_over_in_silence(
    tmp_path: Path, labels: pa.Array, caplog: pytest.LogCaptureFixture
) -> None:
    for number, part in enumerate(("train", "test")):
        table(tmp_path / f"{part}.parquet", labels, seed=50 * number)
    dataset = load(tmp_path)
    assert "they must be integers or strings" in dataset.pool_only
    assert "the images are read without labels" in caplog.text
    with pytest.raises(DataError, match="they must be integers or strings; set data.label_column"):
        make_splits(dataset)


def test_a_column_of_missing_labels_alone(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", pa.nulls(4))
    assert load(tmp_path).train.labels.tolist() == [-1] * 4


@pytest.mark.parametrize("copy", ["train (1)", "train_copy", "train-final"])
def test_a_copy_of_a_file_is_refused_and_not_read_twice(
    tmp_path: Path, copy: str, caplog: pytest.LogCaptureFixture
) -> None:
    table(tmp_path / "train.parquet", [0, 1] * 4)
    table(tmp_path / "test.parquet", [0, 1] * 2, seed=50)
    shutil.copy(tmp_path / "train.parquet", tmp_path / f"{copy}.parquet")
    with pytest.raises(DataError, match=r"train.*\.parquet and .*train.*\.parquet have the same content; remove one"):
        load(tmp_path)
    listed = tuple(str(path) for path in sorted(tmp_path.iterdir()))
    assert len(load(listed).train) == 16
    assert "have the same content; they are read as they are listed" in caplog.text


def test_two_shards_of_one_content_are_a_damaged_download(tmp_path: Path) -> None:
    for index in range(2):
        table(tmp_path / f"train-{index:05d}-of-00002.parquet", [0, 1] * 4)
    with pytest.raises(DataError, match="have the same content"):
        load(tmp_path, test_fraction=0.5)
    table(tmp_path / "train-00001-of-00002.parquet", [0, 1] * 4, seed=9)
    assert len(load(tmp_path, test_fraction=0.5).train) == 8


def test_two_columns_of_images_are_not_chosen_from(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", [0, 1] * 4)
    written = pq.read_table(tmp_path / "train.parquet")
    both = written.append_column("img", written.column("image"))
    pq.write_table(both, tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has the columns 'img' and 'image'; set data.image_column to one of them"):
        load(tmp_path, test_fraction=0.5)
    assert len(load(tmp_path, test_fraction=0.5, image_column="img").train) == 4


def test_parts_of_different_datasets_are_not_put_together(tmp_path: Path) -> None:
    table(tmp_path / "cats" / "train.parquet", [0, 1] * 4)
    table(tmp_path / "dogs" / "test.parquet", [0, 1] * 2, seed=50)
    with pytest.raises(DataError, match=r"cats/train.parquet and .*dogs/test.parquet lie in the folders of different"):
        load(tmp_path)
    listed = (str(tmp_path / "cats" / "train.parquet"), str(tmp_path / "dogs" / "test.parquet"))
    assert len(load(listed).test) == 4
    (tmp_path / "dogs").rename(tmp_path / "cats" / "more")
    assert len(load(tmp_path).test) == 4, "one folder lies in the other"
