"""Tables: lazy, strict, and able to say what a config may set."""

from __future__ import annotations

import pickle
import sys
import warnings
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from mea_ray.core.errors import ConfigError
from mea_ray.core.registry import Table, documented_arguments
from mea_ray.core.settings import Settings
from mea_ray.core.words import nearest


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


class Blade(Settings):
    """The blade of a saw."""

    renamed: ClassVar[dict[str, str]] = {"wide": "width"}
    width: float = Field(2.0, gt=0, lt=10, description="Width in cm.")
    teeth: Annotated[int, Field(ge=1)] | None = Field(None, description="Number of teeth.")


class Handle(Settings):
    """The handle of a saw.

    Attributes:
        length: Length in cm.
        blade: Of a saw with two of them.
    """

    length: float = 10.0
    blade: Blade = Blade(width=5.0, teeth=7)


class Saw:
    """A saw.

    Args:
        strokes: Number of strokes.
        blade: The blade.
        handle: The handle.
    """

    version: ClassVar[int] = 3
    renamed: ClassVar[dict[str, str]] = {"blade_width": "blade.width", "cuts": "strokes"}

    def __init__(
        self,
        *,
        strokes: Annotated[int, Field(ge=1)] = 1,
        blade: Blade = Blade(teeth=30),
        handle: Handle | None = None,
    ) -> None:
        self.strokes, self.blade, self.handle = strokes, blade, handle


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    module = ModuleType("some_tools")
    module.Tool = Tool  # type: ignore[attr-defined]
    module.Saw = Saw  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_tools", module)
    return Table("tool", {"tool": "some_tools:Tool", "saw": "some_tools:Saw", "absent": "no_such_module:X"})


def test_names_are_known_without_importing_anything(table: Table) -> None:
    assert table.names() == ["absent", "saw", "tool"]
    with pytest.raises(ModuleNotFoundError):
        table.resolve("absent")


def test_an_unknown_name_gives_the_nearest_and_the_list(table: Table) -> None:
    with pytest.raises(ConfigError, match=r"unknown tool 'tol'; did you mean 'tool'\? Known: absent, saw, tool"):
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


def test_constraints_of_the_annotation_are_checked(table: Table) -> None:
    with pytest.raises(ConfigError, match="tool 'saw': strokes=0: Input should be greater than or equal to 1"):
        table.check("saw", {"strokes": 0})


def test_a_group_is_listed_by_paths_with_type_default_range_and_meaning(table: Table) -> None:
    listed = [(p.name, p.type, p.default, p.range, p.doc) for p in table.parameters("saw")]
    assert listed == [
        ("strokes", "int", 1, ">= 1", "Number of strokes."),
        ("blade.width", "float", 2.0, "in (0, 10)", "Width in cm."),
        ("blade.teeth", "int | null", 30, ">= 1", "Number of teeth."),
        ("handle", "null | group", None, "", "The handle."),
        ("handle.length", "float", 10.0, "", "Length in cm."),
        ("handle.blade.width", "float", 5.0, "in (0, 10)", "Width in cm."),
        ("handle.blade.teeth", "int | null", 7, ">= 1", "Number of teeth."),
    ]


def test_a_part_of_a_group_changes_its_default(table: Table) -> None:
    saw = table.build("saw", blade={"width": 3}, handle={"blade": {"width": 1}})
    assert saw.blade == Blade(width=3.0, teeth=30)
    assert saw.handle == Handle(length=10.0, blade=Blade(width=1.0, teeth=7))
    assert table.build("saw").handle is None


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"blade": {"width": 10}}, "blade.width=10: Input should be less than 10"),
        ({"blade": {"widht": 1}}, r"blade.widht: unknown key; did you mean 'width'\? Known: width, teeth"),
        ({"handle": {"blade": {"teeth": 0}}}, "handle.blade.teeth=0"),
        ({"handle": {"length": float("nan")}}, "handle.length=nan"),
    ],
)
def test_a_wrong_value_in_a_group_is_refused_with_its_path(table: Table, params: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        table.check("saw", params)


def test_an_old_name_is_accepted_with_one_warning_that_names_the_new_path(table: Table) -> None:
    with pytest.warns(
        FutureWarning, match=r"'saw': 'blade_width' is now 'blade\.width'; write blade\.width=4"
    ) as caught:
        checked = table.check("saw", {"blade_width": 4})
    assert len(caught) == 1
    assert checked["blade"] == Blade(width=4.0, teeth=30)
    with pytest.warns(FutureWarning):
        assert table.check("saw", {"cuts": 5, "strokes": 2})["strokes"] == 5
    with pytest.warns(FutureWarning, match="Blade: 'wide' is now 'width'"):
        assert table.check("saw", {"handle": {"blade": {"wide": 3}}})["handle"].blade == Blade(width=3.0, teeth=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.check("saw", checked)


def test_a_component_says_its_version(table: Table) -> None:
    assert (table.version("tool"), table.version("saw")) == (1, 3)
