"""Every command and every Python block of the documentation is run, or checked, as a reader would type it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from doc_blocks import LANGUAGES, ROOT, Runner, blocks

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAIN = {"run", "sweep", "calibrate", "bench"}
EXTRAS = {"whole_way.md": ("art", "onnxruntime", "requests")}
"""Packages that the slow blocks of a page need beyond those of the tests."""
SLOW = [page for page in PAGES if any(block.how == "slow" for block in blocks(page))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_its_language_and_training_is_marked(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: say what it is: {', '.join(sorted(LANGUAGES))}"
        assert block.language != "console" or block.commands(), f"{block.where}: no line begins with `$ `"
        if block.how == "run":
            long = [command for command in block.commands() if command.split()[:2][-1] in TRAIN]
            assert not long, f"{block.where}: it trains; say `run: slow` or `run: check` above it: {long}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    for block in blocks(page):
        runner.run(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_the_slow_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    for package in EXTRAS.get(page.name, ()):
        pytest.importorskip(package)
    runner = Runner(tmp_path, slow=True)
    try:
        for block in blocks(page):
            runner.run(block)
    finally:
        for note in tmp_path.glob("*.pid"):  # services that a page started and that a failure left
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(note.read_text()), signal.SIGTERM)
