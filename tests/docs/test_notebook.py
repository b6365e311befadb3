"""The notebook of the documentation runs from start to end, and reaches the committed verdicts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from notebooks import ROOT, execute, printed

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
JUDGED = re.compile(r"^(stolen|innocent): (.+), p = (\S+)$", re.MULTILINE)


def test_the_notebook_is_committed_executed() -> None:
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)) and NOTEBOOK.stat().st_size < 60_000
    assert {name for name, _, _ in JUDGED.findall(printed(book))} == {"stolen", "innocent"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    judged = {name: (verdict, float(p)) for name, verdict, p in JUDGED.findall(printed(execute(NOTEBOOK, tmp_path)))}
    assert judged["stolen"][1] < 0.05 < judged["innocent"][1], judged
