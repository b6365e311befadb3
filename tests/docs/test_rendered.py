"""Every table and curve of the documentation matches the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from mea_ray.report import pages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_rendered_page_is_up_to_date(page: Path) -> None:
    stale = pages.out_of_date(page, ROOT / "sweeps" / "results", ROOT / "docs" / "images")
    assert not stale, f"run: mea-ray report sweeps/results --page {page.relative_to(ROOT)}"
