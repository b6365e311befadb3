"""Labels of several tables: each row keeps the class that its own file names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.data.labels import MAX_CLASSES, Column, column_of, unify

Value = int | str | None


def column(values: list[Value], names: tuple[str, ...] = (), source: str = "file") -> Column:
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    rows = np.array([-1 if value is None else distinct.index(value) for value in values], np.int64)
    return column_of(source, "label", distinct, rows, names)


def named(columns: list[Column], wanted: tuple[str, ...] | None = None) -> list[list[str | None]]:
    names, labels = unify(columns, wanted)
    assert all(each.dtype == np.int64 for each in labels)
    return [[names[label] if label >= 0 else None for label in each] for each in labels]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_row_keeps_the_name_that_its_file_gives_it(data: st.DataObject) -> None:
    """Files list the same classes in any order, or write the names themselves."""
    classes = ["x", "y", "z", "w"]
    columns, truth = [], []
    for number in range(data.draw(st.integers(1, 4))):
        order = data.draw(st.permutations(classes))
        rows = data.draw(st.lists(st.integers(-1, 3), min_size=1, max_size=8))
        truth.append([order[row] if row >= 0 else None for row in rows])
        if data.draw(st.booleans()):
            columns.append(column(list(rows), tuple(order), f"file {number}"))
        else:
            columns.append(column(list(truth[-1]), (), f"file {number}"))
    wanted = data.draw(st.none() | st.permutations(classes).map(tuple))
    assert named(columns, wanted) == truth
    names, _ = unify(columns, wanted)
    used = {name for rows in truth for name in rows if name is not None}
    assert set(names) == used
    if wanted is not None:
        assert list(names) == [name for name in wanted if name in used], "the config's list gives the order"


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_numbers_without_names_become_classes_without_gaps(values: list[int]) -> None:
    names, (labels,) = unify([column(list(values))], None)
    assert [int(names[label]) for label in labels] == values
    assert [int(name) for name in names] == sorted(set(values))


def test_numbers_from_zero_on_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    names, labels = unify([column([2, 0]), column([1, -1, 1])], None)
    assert names == ("0", "1", "2") and [each.tolist() for each in labels] == [[2, 0], [1, -1, 1]]
    assert not caplog.text


def test_closed_gaps_and_dropped_classes_cause_warnings(caplog: pytest.LogCaptureFixture) -> None:
    names, (labels,) = unify([column([1, 2, 5], (), "one-based")], None)
    assert names == ("1", "2", "5") and labels.tolist() == [0, 1, 2]
    assert "of one-based: the 3 labels go from 1 to 5" in caplog.text
    caplog.clear()
    names, (labels,) = unify([column([0, 2], ("cat", "dog", "eel"), "hub")], None)
    assert names == ("cat", "eel") and labels.tolist() == [0, 1]
    assert "1 of 3 classes have no image and are dropped, e.g. 'dog'" in caplog.text


def test_names_of_the_config(caplog: pytest.LogCaptureFixture) -> None:
    assert named([column([0, 1])], ("cat", "dog")) == [["cat", "dog"]]
    assert named([column([1, 2])], ("cat", "dog")) == [["cat", "dog"]], "numbered from 1"
    assert "the first of data.class_names is 1" in caplog.text
    hub = column([0, 1], ("cat", "dog", "eel"))
    assert named([hub], ("tabby", "dog")) == [["tabby", "dog"]], "a new name for a number"
    assert named([hub], ("eel", "dog", "cat")) == [["cat", "dog"]], "another order"
    for wanted in (("dog", "tabby"), ("cat",), ("dog", "eel", "tabby")):
        with pytest.raises(DataError, match=r"label 'cat'|label 'dog'"):
            unify([hub], wanted)
    with pytest.raises(DataError, match="'cow' in column 'label' is not among"):
        unify([column(["cow"])], ("cat",))
    with pytest.raises(DataError, match=r"go from 0 to 2, with 2 class names they must lie in \[0, 2\)"):
        unify([column([0, 2])], ("cat", "dog"))
    with pytest.raises(ConfigError, match="repeats a name"):
        unify([hub], ("cat", "cat"))


def test_a_file_without_names_takes_those_of_the_others() -> None:
    first, bare = column([0, 1], ("x", "y")), column([1, 0])
    assert named([first, bare]) == [["x", "y"], ["y", "x"]]
    with pytest.raises(DataError, match="bare numbers its classes without naming them"):
        unify([first, column([0], ("y", "x")), column([1], (), "bare")], None)
    with pytest.raises(DataError, match=r"other: labels .* go from 0 to 2, with 2 class names"):
        unify([first, column([0, 2], ("y", "x"), "other")], None)


def test_integers_and_strings_agree_only_through_names() -> None:
    assert named([column([0, 1], ("x", "y")), column(["y", "x"])]) == [["x", "y"], ["y", "x"]]
    with pytest.raises(DataError, match="integers in some files and strings in others"):
        unify([column([0, 1]), column(["0"])], None)


def test_rows_without_labels() -> None:
    names, labels = unify([column([-1, -1, None]), column([None])], None)
    assert names == () and [each.tolist() for each in labels] == [[-1, -1, -1], [-1]]
    assert column([-1, 3, None]).unlabelled == 2
    assert named([column(["a", None])]) == [["a", None]]


def test_columns_that_are_no_classes_are_refused() -> None:
    with pytest.raises(DataError, match="has the label -7; labels are 0 or more"):
        column([0, -7])
    with pytest.raises(DataError, match="names two of its classes 'cat'"):
        column([0], ("cat", "cat"))
    with pytest.raises(DataError, match=rf"has {MAX_CLASSES + 1:,} different labels"):
        column_of("file", "id", range(MAX_CLASSES + 1), np.arange(MAX_CLASSES + 1), ())


def test_one_huge_label_costs_nothing() -> None:
    names, (labels,) = unify([column([0, 2**62])], None)
    assert names == ("0", str(2**62)) and labels.tolist() == [0, 1]
