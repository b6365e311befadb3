"""Names of parts, and numbered files: one reading for all loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_ray.core.errors import DataError
from mea_ray.data.parts import check_shards, parts_of, without_shard

WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
}
ADDITIONS = ("set", "split", "images", "data", "2017", "")


@settings(max_examples=60, deadline=None)
@given(
    part=st.sampled_from(sorted(WORDS)),
    data=st.data(),
    style=st.sampled_from([str.lower, str.upper, str.capitalize]),
    joint=st.sampled_from(["_", "-", " ", ".", ""]),
    addition=st.sampled_from(ADDITIONS),
    first=st.booleans(),
)
def test_case_separators_and_empty_words_do_not_matter(
    part: str, data: st.DataObject, style: object, joint: str, addition: str, first: bool
) -> None:
    assert callable(style)
    word = style(data.draw(st.sampled_from(WORDS[part])))
    # Without a separator an addition can only follow.
    name = f"{addition}{joint}{word}" if first and joint else f"{word}{joint}{addition}"
    assert parts_of([name]) == {name: part}


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["seg_train", "seg_test", "seg_pred"], ["train", "test", None]),
        (["cifar_train", "cifar_test"], ["train", "test"]),
        (["TrainImages", "testSet"], ["train", "test"]),
        (["trainval", "test"], ["train", "test"]),
        (["train_val", "test"], ["train", "test"]),
        (["train_station", "test_tube"], [None, None]),
        (["train", "hold-out", "Hold_Out set", "household outing"], ["train", "test", "test", None]),
        (["cifar_train"], [None]),
        (["validation_train_test"], [None]),
        (["strain", "contest", "interval", "trains", "évaluation"], [None] * 5),
        (["cat", "dog", "2012", "", "_"], [None] * 5),
    ],
)
def test_names_beside_each_other(names: list[str], parts: list[str | None]) -> None:
    assert [parts_of(names).get(name) for name in names] == parts


def test_names_of_files_may_go_on() -> None:
    assert parts_of(["train_fold3", "my_train"], prefixes=True) == {"train_fold3": "train"}


def test_the_number_of_a_shard_says_nothing_about_the_part() -> None:
    assert without_shard("train-00000-of-00005-5b3e9d0fade") == "train-"
    assert without_shard("00000-of-00005-train") == "-train"
    assert without_shard("train") == "train"


def files(*names: str) -> list[Path]:
    return [Path("/data") / f"{name}.parquet" for name in names]


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 40), data=st.data())
def test_all_shards_must_be_there(total: int, data: st.DataObject) -> None:
    there = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    shards = files(*(f"train-{index:05d}-of-{total:05d}" for index in there))
    if len(there) == total:
        check_shards(shards)
        return
    missing = sorted(set(range(total)) - set(there))
    with pytest.raises(DataError) as caught:
        check_shards(shards)
    message = str(caught.value)
    assert f"{len(there)} of the {total} files train-*-of-{total:05d} are in /data" in message
    assert f"{missing[0]:05d}" in message and "list the wanted files in data.path" in message


def test_missing_shards_are_listed_but_not_all_of_them() -> None:
    with pytest.raises(DataError, match=r"3 of the 5 files .*; 00001 and 00003 are missing"):
        check_shards(files("train-00000-of-00005", "train-00002-of-00005", "train-00004-of-00005"))
    with pytest.raises(DataError, match=r"; 0 is missing;"):
        check_shards(files("train_1_of_2"))
    with pytest.raises(DataError, match=r"1, 2, 3, 4, 5 and 999,999,999,993 more are missing"):
        check_shards(files("train-0-of-999999999999"))


def test_shards_may_be_numbered_from_one() -> None:
    check_shards(files("train-00001-of-00002", "train-00002-of-00002"))
    check_shards(files("train-1-of-1"))
    with pytest.raises(DataError, match=r"2 of the 3 files .*; 00002 is missing; complete the download"):
        check_shards(files("train-00001-of-00003", "train-00003-of-00003"))
    with pytest.raises(DataError, match=r"is number 4 of 2, which are numbered from 1"):
        check_shards(files("train-1-of-2", "train-2-of-2", "train-4-of-2"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-0-of-2", "train-1-of-2", "train-0-of-3"], "belong to different divisions"),
        (["train-0-of-2", "train-1-of-2", "train-1-of-2 (1)"], "are both number 1 of 2"),
        (["train-0-of-2", "train-2-of-2"], "is number 2 of 2, which are numbered from 0"),
        (["train-0-of-1", "train"], "train.parquet stands beside the shards"),
    ],
)
def test_shards_that_contradict_each_other(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_shards(files(*names))


def test_a_gap_between_numbers_without_a_total_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_shards([tmp_path / "0000.parquet", tmp_path / "0003.parquet"])
    assert "numbered from 0 to 3, 2 are missing, e.g. 1" in caplog.text
    caplog.clear()
    check_shards([tmp_path / "a-2018.parquet", tmp_path / "a-2020.parquet"])
    check_shards([tmp_path / "0000.parquet", tmp_path / "0001.parquet"])
    check_shards([tmp_path / "train.parquet"])
    assert not caplog.text
