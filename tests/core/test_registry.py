"""Tables: lazy, strict, and able to say what a config may set."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType
from typing import Literal

import pytest

from mea_ray.core.errors import ConfigError
from mea_ray.core.registry import Table, documented_arguments, nearest


class Tool:
    """A tool.

    Args:
        shape: Given by the program.
        size: How large, in cm;
            on two lines: with a colon.
        kind: Which kind.

    Raises:
        ConfigError: Never.
    """

    def __init__(
        self, shape: int, *, size: float = 1.0, kind: Literal["a", "b"] = "a", sides: tuple[int, ...] = (1,)
    ) -> None:
        self.shape, self.size, self.kind, self.sides = shape, size, kind, sides


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    module = ModuleType("some_tools")
    module.Tool = Tool  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_tools", module)
    return Table("tool", {"tool": "some_tools:Tool", "absent": "no_such_module:X"})


def test_names_are_known_without_importing_anything(table: Table) -> None:
    assert table.names() == ["absent", "tool"]
    with pytest.raises(ModuleNotFoundError):
        table.resolve("absent")


def test_an_unknown_name_gives_the_nearest_and_the_list(table: Table) -> None:
    with pytest.raises(ConfigError, match=r"unknown tool 'tol'; did you mean 'tool'\? Known: absent, tool"):
        table.resolve("tol")


def test_parameters_are_the_keyword_only_ones_with_their_documentation(table: Table) -> None:
    size, kind, sides = table.parameters("tool")
    assert (size.name, size.type, size.default) == ("size", "float", 1.0)
    assert size.doc == "How large, in cm; on two lines: with a colon."
    assert (kind.doc, sides.doc) == ("Which kind.", "")


def test_check_fills_in_defaults_and_converts(table: Table) -> None:
    assert table.check("tool", {"size": 2, "sides": [3, 4]}) == {"size": 2.0, "kind": "a", "sides": (3, 4)}
    assert isinstance(table.check("tool", {"size": 2})["size"], float)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"sise": 1}, r"no parameter 'sise'; did you mean 'size'\?"),
        ({"shape": 1}, "no parameter 'shape'"),
        ({"size": "big"}, "size='big'"),
        ({"kind": "c"}, "kind='c'"),
    ],
)
def test_wrong_parameters_are_refused(table: Table, params: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        table.check("tool", params)


def test_build_gives_positional_from_the_program_and_the_rest_from_the_config(table: Table) -> None:
    built = table.build("tool", 7, kind="b")
    assert (built.shape, built.kind, built.size) == (7, "b", 1.0)


def test_a_table_can_be_sent_to_another_process_after_it_was_used(table: Table) -> None:
    table.check("tool", {})
    sent = pickle.loads(pickle.dumps(table))
    assert (sent.kind, sent.entries) == (table.kind, table.entries)
    assert sent.check("tool", {}) == table.check("tool", {})


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("zzzz", ["alpha", "beta"]) == ""
    assert nearest("bta", ["alpha", "beta"]) == "; did you mean 'beta'?"


def test_docstrings_without_arguments_document_none() -> None:
    assert documented_arguments(None) == {}
    assert documented_arguments("Only a summary.") == {}
