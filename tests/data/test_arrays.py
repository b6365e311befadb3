from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mea_ray.core.errors import DataError
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data import memory
from mea_ray.data.arrays import NAMES, load, save_arrays


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
        ("pickled.npz", "lacks|not a readable"),
        ("broken.npz", "not a readable"),
        ("none.npz", "not a readable"),
    ):
        with pytest.raises(DataError, match=words):
            load(path=str(tmp_path / name))
    with pytest.raises(DataError, match="data.path is missing"):
        load()


def written(path: Path, **changes: object) -> Path:
    """Write the file with other arrays in the place of some."""
    arrays = {
        "train_images": np.zeros((4, 1, 3, 3), np.uint8),
        "train_labels": np.array([0, 1, 0, 1]),
        "test_images": np.zeros((2, 1, 3, 3), np.uint8),
        "test_labels": np.array([0, 1]),
        "class_names": np.array(["a", "b"]),
    }
    np.savez(path, **{**arrays, **changes})  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([0.0, 0.9, 0.0, 1.0])}, "train_labels must be integers, got float64"),
        ({"test_labels": np.array([True, False])}, "test_labels must be integers, got bool"),
        ({"train_labels": np.array(["0", "1", "0", "1"])}, "train_labels must be integers, got <U1"),
        ({"train_labels": np.array([0, 1, 0, 2**64 - 1], np.uint64)}, "train_labels must be integers, got uint64"),
        ({"train_labels": np.array([0, 1, 0, 2])}, r"train: labels must lie in \[0, 2\)"),
        ({"train_labels": np.array([[0, 1, 0, 1]])}, r"train: labels must be int64 \(4,\)"),
        ({"train_labels": np.array([0, 1])}, r"train: labels must be int64 \(4,\)"),
        ({"train_images": np.zeros((4, 1, 3, 3))}, "train: images must be uint8"),
        ({"train_images": np.zeros((4, 3, 3), np.uint8)}, "train: images must be uint8"),
        ({"train_images": np.zeros((4, 8, 8, 3), np.uint8)}, r"train: .* look like \(N, H, W, C\), they must be"),
        ({"class_names": np.array(["a", "a"])}, "two classes are called 'a'; give each class a name of its own"),
        ({"class_names": np.array("a")}, r"class_names must be strings of shape \(classes,\)"),
        ({"class_names": np.array([b"a", b"b"])}, "class_names must be strings"),
        ({"class_names": np.array([1, 2])}, "class_names must be strings"),
        ({"class_names": np.array(["a", None], dtype=object)}, "not a readable .npz file: Object arrays"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else next(iter(value)),
)
def test_arrays_of_another_type_are_refused_and_never_converted(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(path=str(written(tmp_path / "d.npz", **changes)))


def test_any_integers_are_labels(tmp_path: Path) -> None:
    file = written(
        tmp_path / "d.npz", train_labels=np.array([1, 0, -1, 1], np.int8), test_labels=np.array([1, 0], np.uint64)
    )
    dataset = load(path=str(file))
    assert dataset.train.labels.tolist() == [1, 0, -1, 1] and dataset.test.labels.tolist() == [1, 0]


def test_images_that_are_in_both_parts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = np.arange(6, dtype=np.uint8).repeat(9).reshape(6, 1, 3, 3)
    load(path=str(written(tmp_path / "d.npz", train_images=images[:4], test_images=images[2:4])))
    assert "d.npz: 2 different images in test are in train, too" in caplog.text
    caplog.clear()
    load(path=str(written(tmp_path / "e.npz", train_images=images[:4], test_images=images[4:])))
    assert not caplog.text


def test_what_is_easily_wrong_in_arrays_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    train, test = (rng.integers(2, 256, (n, 1, 3, 3), dtype=np.uint8) for n in (40, 2))
    labels = {"train_labels": np.arange(40) % 2, "test_labels": np.arange(2)}

    def said(name: str, **changes: Any) -> str:
        caplog.clear()
        load(path=str(written(tmp_path / name, **{"train_images": train, "test_images": test, **labels, **changes})))
        return caplog.text

    assert not said("right.npz")
    assert "'cat', 'Cat' are 2 classes that differ in case" in said("case.npz", class_names=np.array(["cat", "Cat"]))
    assert "'2' is class 0, '1' is class 1" in said("numbers.npz", class_names=np.array(["2", "1"]))
    twice = np.concatenate([train[:38], train[:2]])  # two copies of 40, each in its own class
    assert not said("few.npz", train_images=twice)
    thrice = np.concatenate([train[:36], train[:4]])
    assert "4 of the 40 images in train are copies of others" in said("copies.npz", train_images=thrice)
    crossed = np.concatenate([train[:39], train[:1]])
    assert "1 different images in train are in two classes or more" in said("crossed.npz", train_images=crossed)
    dark = said("dark.npz", train_images=(train > 99).astype(np.uint8), test_images=test)
    assert "all pixels in train are 0 or 1" in dark


def test_what_git_lfs_has_not_downloaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=r"d\.npz is a pointer of Git LFS; run `git lfs pull`"):
        load(path=str(tmp_path / "d.npz"))


def test_a_small_file_of_many_pixels_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.npz"
    arrays: dict[str, Any] = {name: np.zeros(1) for name in NAMES}
    arrays["train_images"] = np.zeros((3000, 1, 100, 100), np.uint8)
    np.savez_compressed(path, **arrays)
    assert path.stat().st_size < 60_000
    monkeypatch.setattr(memory, "free_memory", lambda: 20_000_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(DataError, match=r"the arrays in .*bomb.npz need 0.0 GiB of memory.*write fewer"):
        load(path=str(path))


def test_what_is_no_archive_of_arrays_is_refused_in_words(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "folder.npz").mkdir()
    with zipfile.ZipFile(tmp_path / "texts.npz", "w") as file:
        file.writestr("train_images.txt", "x")
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as file:
        file.writestr("train_images.npy", b"\x93NUMPY\x01\x00\xff\xff{")
    for name in ("one.npy", "empty.npz", "folder.npz", "texts.npz", "header.npz", "bad\0name"):
        with pytest.raises(DataError, match=r"not a readable|lacks|cannot open"):
            load(path=str(tmp_path / name))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_or_read_but_never_fail_otherwise(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, **dict(np.load(written(tmp_path / "whole.npz"))))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load(path=str(path))
    except DataError as error:
        assert "d.npz" in str(error) or "arrays" in str(error)
