"""The order of classes, which decides their labels, and names that are easily taken for each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import bars_in, class_folders, image_files, load, named_labels, table

from mea_ray.core.errors import DataError
from mea_ray.data.classes import in_order, warn_of_names


@given(numbers=st.lists(st.integers(), unique=True, max_size=30))
def test_whole_numbers_are_sorted_as_numbers(numbers: list[int]) -> None:
    assert in_order(map(str, numbers)) == [str(number) for number in sorted(numbers)]


@settings(max_examples=40)
@given(names=st.lists(st.text(max_size=5), unique=True, max_size=10))
def test_other_names_are_sorted_as_text(names: list[str]) -> None:
    names = [*names, "cat"]
    assert in_order(names) == sorted(names)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["07", "7", "6"], ["6", "07", "7"]),
        (["-1", "1", "0"], ["-1", "0", "1"]),
        (["10", "2", "cat"], ["10", "2", "cat"]),
        (["1.5", "10", "2"], ["1.5", "10", "2"]),
        (["\u0663", "10", "2"], ["10", "2", "\u0663"]),
        (["1_0", "2"], ["1_0", "2"]),
        (["9" * 300, "10"], ["10", "9" * 300]),
        ([], []),
    ],
)
def test_names_that_look_like_numbers(names: list[str], order: list[str]) -> None:
    assert in_order(names) == order


def numbered(root: Path, count: int = 4) -> None:
    """Write the classes 1, 2 and 10, with as many bars as their place."""
    for bars, name in enumerate(("1", "2", "10"), 1):
        image_files(root / name, count, bars)


def test_folders_of_numbers_are_classes_in_the_order_of_the_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbered(tmp_path / "train")
    numbered(tmp_path / "test", 2)
    dataset = load("image_folder", tmp_path, image_size=16)
    assert dataset.train.class_names == dataset.test.class_names == ("1", "2", "10")
    assert [bars_in(image) for image in dataset.train.images] == [1] * 4 + [2] * 4 + [3] * 4
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert "'1' is class 0, '2' is class 1, '10' is class 2" in caplog.text


def test_another_order_is_another_dataset(tmp_path: Path) -> None:
    """What is trained is named by the content, labels included: an order that changes renames it."""
    numbered(tmp_path)
    sorted_as_numbers = load("image_folder", tmp_path, image_size=16)
    as_text = load("image_folder", tmp_path, image_size=16, class_names=("1", "10", "2"))
    assert as_text.train.class_names == ("1", "10", "2")
    assert sorted(named_labels(as_text.train)) == sorted(named_labels(sorted_as_numbers.train))
    assert all(
        {"1": 1, "2": 2, "10": 3}[name] == bars_in(image)
        for name, image in zip(named_labels(as_text.train), as_text.train.images, strict=True)
    )
    assert as_text.fingerprint != sorted_as_numbers.fingerprint


@pytest.mark.parametrize("names", [("1", "2"), ("1", "2", "10", "11"), ("1", "2", "2"), ("1", "2", "ten")])
def test_the_order_of_the_config_names_every_folder_once(tmp_path: Path, names: tuple[str, ...]) -> None:
    numbered(tmp_path)
    with pytest.raises(DataError, match=r"data.class_names=.* must list each folder of a class in .* once"):
        load("image_folder", tmp_path, class_names=names)


def test_images_without_classes_have_no_names(tmp_path: Path) -> None:
    image_files(tmp_path, 4)
    with pytest.raises(DataError, match="must list each folder of a class"):
        load("image_folder", tmp_path, class_names=("a", "b"))


def test_texts_of_numbers_in_tables_are_sorted_as_numbers(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", ["10", "2", "1", "10"], bars=[3, 2, 1, 3])
    table(tmp_path / "test.parquet", ["2", "10", "1"], bars=[2, 3, 1], seed=50)
    dataset = load("parquet", tmp_path)
    assert dataset.train.class_names == ("1", "2", "10")
    assert dataset.train.labels.tolist() == [2, 1, 0, 2] and dataset.test.labels.tolist() == [1, 2, 0]


def test_persons_called_by_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    for person in ("9", "10", "100"):
        image_files(tmp_path / person / "0", 4)
    dataset = load("youtube_faces", tmp_path, image_size=16, crop="full", min_images=2)
    assert dataset.train.class_names == ("9", "10", "100")


@pytest.mark.parametrize(
    "pair", [("Cat", "cat"), ("a b", "a  b"), ("a ", "a"), ("\uff23at", "Cat"), ("Stra\u00dfe", "STRASSE")]
)
def test_classes_that_differ_in_case_or_spaces_alone_cause_a_warning(
    tmp_path: Path, pair: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path, (*pair, "dog"))
    dataset = load("image_folder", tmp_path)
    assert dataset.train.classes == 3
    assert "are 2 classes that differ in case or spaces alone; give them one name" in caplog.text


def test_the_same_of_texts_in_tables_and_of_persons(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table(tmp_path / "t" / "train.parquet", ["Cat", "cat", "dog"] * 2)
    load("parquet", tmp_path / "t", test_fraction=0.5)
    for person in ("A_B", "a_b"):
        image_files(tmp_path / "f" / person / "0", 4)
    load("youtube_faces", tmp_path / "f", image_size=16, crop="full", min_images=2)
    assert caplog.text.count("differ in case or spaces alone") == 2


def test_names_that_are_what_they_seem_are_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_names([str(number) for number in range(12)], "here")
    warn_of_names(["Cat", "dog", "10"], "here")
    warn_of_names([], "here")
    assert not caplog.text


def test_a_blank_name_causes_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_names(["", "cat"], "here")
    assert "here: '' is the name of a class; if it stands for a missing label, make it null" in caplog.text


def test_one_pair_is_named_and_the_others_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_names([*"abcABC"], "letters")
    assert "letters: 'a', 'A' are 2 classes" in caplog.text and "and 2 others do" in caplog.text
    assert np.all([name in caplog.text for name in ("'a'", "'A'")])
