"""The notebooks of the documentation run from start to end, and print what the committed ones print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from notebooks import ROOT, execute, printed

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
SWEEP = ROOT / "docs" / "sweep_notebook.ipynb"
JUDGED = re.compile(r"^(stolen|innocent): (.+), p = (\S+)$", re.MULTILINE)


def committed(path: Path) -> Any:
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)) and path.stat().st_size < 60_000
    return book


def test_the_notebooks_are_committed_executed() -> None:
    assert {name for name, _, _ in JUDGED.findall(printed(committed(NOTEBOOK)))} == {"stolen", "innocent"}
    assert 0 < stopped_early(committed(SWEEP)) < 9


def stopped_early(book: Any) -> int:
    return int(printed(book).partition("stopped early: ")[2].split()[0])


@pytest.mark.slow
def test_the_notebook_of_a_sweep_runs(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    assert 0 < stopped_early(execute(SWEEP, tmp_path)) < 9


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    judged = {name: (verdict, float(p)) for name, verdict, p in JUDGED.findall(printed(execute(NOTEBOOK, tmp_path)))}
    # The key is drawn anew in each run, so the innocent model's p-value is any; below 0.01 in one run of a hundred.
    assert judged["stolen"][1] < min(0.05, judged["innocent"][1]) and judged["innocent"][0] == "not proved", judged
