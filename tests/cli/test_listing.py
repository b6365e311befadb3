"""What ``mea-ray list`` shows at 80 columns and in a wide terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mea_ray.cli import catalogue, sweeps
from mea_ray.cli.listing import Listing, choice_of, config_rows, summary_of
from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ConfigError

KINDS = [kind for kind in catalogue.TABLES if kind != "benchmarks"]


def listing_at(width: int, kind: str | None = None, name: str | None = None) -> str:
    console = Console(file=io.StringIO(), width=width)
    catalogue.show(console, kind, name)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_everything_fits_into_80_columns_and_no_name_is_broken() -> None:
    output = listing_at(80)
    assert max(map(len, output.splitlines())) <= 80
    for kind in KINDS:
        for name in catalogue.table(kind).names():
            assert any(line.split()[:1] == [name] for line in output.splitlines()), name
    assert all(name in output for name in sweeps.names())


@pytest.mark.parametrize("kind", [*KINDS, "config", "sweeps"])
def test_settings_fit_into_80_columns_and_their_names_are_whole(kind: str) -> None:
    output = listing_at(80, kind)
    assert max(map(len, output.splitlines())) <= 80
    if kind in KINDS:
        table = catalogue.table(kind)
        names = [each.name for name in table.names() for each in table.parameters(name)]
    else:
        names = [row[0] for row in config_rows(ExperimentConfig)] if kind == "config" else sweeps.names()
    starts = {line.split()[0] for line in output.splitlines() if line.strip()}
    assert {name for name in names if not name.startswith("on_")} <= starts


@pytest.mark.parametrize("kind", KINDS)
def test_every_component_says_when_to_choose_it(kind: str) -> None:
    table = catalogue.table(kind)
    for name in table.entries:
        line = choice_of(table.resolve(name))
        assert line.startswith("Choose it "), f"{kind} {name}: a sentence of its docstring must begin with `Choose it`"
        assert len(line) <= 110, f"{kind} {name}: {len(line)} characters; say it shorter"


def test_a_wide_terminal_shows_a_table() -> None:
    assert "Meaning" in listing_at(160, "attacks", "distillation") and "Meaning" not in listing_at(
        80, "attacks", "distillation"
    )


def test_a_default_that_is_empty_is_seen() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(Listing("x", "About.", []))
    file = console.file
    assert isinstance(file, io.StringIO) and "no settings" in file.getvalue()


def test_the_line_of_a_component_is_a_sentence_of_its_docstring() -> None:
    def chosen() -> None:
        """Do something.

        It does it in e.g. two steps. Choose it for
        many images. It costs little.

        Args:
            x: Nothing.
        """

    def plain() -> None:
        """Do something
        long."""

    assert (summary_of(chosen), choice_of(chosen)) == ("Do something.", "Choose it for many images.")
    assert choice_of(plain) == "Do something long."
    assert choice_of(object) and summary_of(type("Bare", (), {"__doc__": None})) == ""


@pytest.mark.parametrize(("typed", "kind"), [("attack", "attacks"), ("policy", "policies"), ("Models", "models")])
def test_a_kind_may_be_typed_in_the_singular(typed: str, kind: str) -> None:
    assert listing_at(80, typed) == listing_at(80, kind)


def test_a_component_is_found_without_its_kind() -> None:
    assert listing_at(80, "knockoff") == listing_at(80, "attacks", "knockoff")
    assert listing_at(80, "thief") == listing_at(80, "config", "thief")
    both = listing_at(80, "none")  # a watermark, and a pretext
    assert "watermarks" in both and "pretexts" in both


@pytest.mark.parametrize(("typed", "hint"), [("attacc", "attacks"), ("knockof", "knockoff")])
def test_what_does_not_exist_is_refused_with_the_nearest_name(typed: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{hint}'"):
        listing_at(80, typed)


def test_no_text_has_the_backquotes_of_docstrings() -> None:
    assert not [kind for kind in [*KINDS, "config"] if "``" in listing_at(160, kind)]
