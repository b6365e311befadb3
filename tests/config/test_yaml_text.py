"""YAML 1.2, with every file that somebody may give refused in one line, in bounded time and memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mea_ray.config import load_experiment
from mea_ray.config.yaml_text import MAX_BYTES, MAX_DEPTH, dump, parse, read
from mea_ray.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("+1.5e+2", 150.0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("12", 12),
        ("-3", -3),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("Off", "Off"),
        ("yes", "yes"),
        ("n", "n"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("=", "="),
        ("e5", "e5"),
        ("'1e3'", "1e3"),
        ("!!str 1e3", "1e3"),
        ("!!float 3", 3.0),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    result = parse(text, "text")
    assert result == value and type(result) is type(value)


def test_keys_are_text() -> None:
    assert parse("{1: a, true: b, null: c, 1.50: d}", "text") == {"1": "a", "true": "b", "null": "c", "1.50": "d"}


def test_mappings_may_be_merged_and_aliases_used() -> None:
    assert parse("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\ne: *x", "text") == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 1, "c": 3},
        "e": {"b": 1, "c": 2},
    }
    assert parse("<<: [{a: 1}, {a: 2, b: 3}]", "text") == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key 'a' is given twice; remove one of them"),
        ("x:\n  y: {b: 1, 'b': 2}", "line 2, column 13: the key 'b' is given twice"),
        ("a: [1", "line 1"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("? [1]\n: 2", "a key must be text"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        (
            "a: !!python/object/apply:os.system ['true']",
            "the tag 'tag:yaml.org,2002:python/object/apply...' is not known",
        ),
        ("a: !mine 3", "the tag '!mine' is not known"),
        ("a: !!binary aGk=", "is not known"),
        ("a: !!int x", "'x' is not an integer"),
        ("a: !!float x", "'x' is not a number"),
        ("a: !!bool 3", "'3' is not a boolean; write true or false"),
        ("a: !!map [1]", "expected keys with values"),
        ("a: !!seq {a: 1}", "expected a list"),
        ("a: !!str [1]", "expected a single value"),
        ("a: 9223372036854775808", "is beyond 9223372036854775807; quote it if it is text"),
        ("a: " + 10_000 * "9", "is beyond"),
        ("a: 0x" + 40 * "f", "is beyond"),
        ("a: *b", "undefined alias"),
        ("a: &a [1, *a]", "an alias stands inside of what it refers to"),
        ("&a {b: {c: *a}}", "an alias stands inside of what it refers to"),
        ("<<: 3", "expected keys with values"),
        ("<<: {a: 1}\n<<: {a: 2}", "line 2, column 1: the key '<<' is given twice; merge several mappings by a list"),
        ("a: \x07", "special characters are not allowed"),
        (60 * "[", f"nested more than {MAX_DEPTH} deep"),
        (100_000 * "[", f"nested more than {MAX_DEPTH} deep"),
        ("\n".join(f"{' ' * depth}a:" for depth in range(500)), f"nested more than {MAX_DEPTH} deep"),
        ("[" + 60_000 * "1," + "]", "more than 50000 values"),
        ("a" * (MAX_BYTES + 1), "characters; split it"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_yaml_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text, "here")
    assert words in str(refused.value)
    assert str(refused.value).startswith("here ") and "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_billion_laughs_take_neither_time_nor_memory() -> None:
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="more than 50000 values, with aliases expanded"):
        parse("\n".join(lines), "text")
    assert time.perf_counter() - started < 20
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom"])
def test_utf_8_and_utf_16_with_a_mark_are_read(encoding: str, tmp_path: Path) -> None:
    text = "storage: füße\n"
    data = b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16-le-bom" else text.encode(encoding)
    (tmp_path / "c.yaml").write_bytes(data)
    assert read(tmp_path / "c.yaml") == {"storage": "füße"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("storage: f\xfc\xdfe".encode("latin-1"), "is not UTF-8: the byte 0xfc at position 10; save it as UTF-8"),
        ("storage: a".encode("utf-16-be"), "special characters are not allowed"),
        (b"\xff\xfes", "is not UTF-8"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is not UTF-8"),
        (b"a" * (MAX_BYTES + 1), "is larger than"),
        (b"", "is empty"),
        (b"[1, 2]", "must hold a mapping"),
        (b"just text", "must hold a mapping"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as refused:
        load_experiment(path)
    assert words in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["absent.yaml", ".", "a\0b", "x" * 5000])
def test_a_path_that_cannot_be_read_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        load_experiment(path)


scalars = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8) | st.sampled_from(
    ["1e3", "on", "yes", "0o7", "007", "1:30", "~", "null", "", "=", "<<", "1_0", "0x1", ".5", "-", "1.", "2024-01-01"]
)
trees = st.recursive(
    scalars | words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)


@given(tree=trees)
def test_what_is_written_reads_back_as_the_same(tree: Any) -> None:
    assert parse(dump(tree), "text") == tree


@pytest.mark.parametrize("text", ["on", "1e3", "1.5", "0o7", "1:30", "null", "2024-01-01", "yes", "~", "12"])
def test_a_reader_of_yaml_1_1_reads_the_same_text(text: str) -> None:
    assert yaml.safe_load(dump({"a": text})) == {"a": text}
