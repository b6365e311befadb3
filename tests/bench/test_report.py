"""The benchmark of reports: its results are in the product's schema, and what it measures is what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mea_ray.bench.drawn_results import drawn, write_drawn
from mea_ray.bench.report import bench_report, table
from mea_ray.core.errors import ConfigError
from mea_ray.results.records import read_results

ROOT = Path(__file__).parents[2]


def test_drawn_results_are_read_back_and_repeat(tmp_path: Path) -> None:
    write_drawn(tmp_path, 6, seeds=2)
    read = read_results(tmp_path)
    assert sorted(read, key=lambda each: each.trial) == list(drawn(6, seeds=2))
    assert len({str({k: v for k, v in each.point.items() if k != "seed"}) for each in read}) == 3


def test_no_points_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"points=\[0\]"):
        bench_report(points=[0])


def test_the_documentation_shows_the_record() -> None:
    record = json.loads((ROOT / "docs" / "records" / "bench_report.json").read_text(encoding="utf-8"))
    assert table(record) in (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8"), "put the new table on the page"
    assert record["points"] == [100, 1000, 5000]
    assert record["cpu_s_1000"] <= 10 and record["page_mb_1000"] <= 3 and record["page_mb_5000"] <= 3


@pytest.mark.slow
def test_a_report_is_measured(tmp_path: Path) -> None:
    measured = bench_report(points=[30], folder=str(tmp_path))
    assert measured["page_mb_30"] == pytest.approx((tmp_path / "report-30" / "report.html").stat().st_size / 1e6)
    assert measured["cpu_s_30"] > 0 and measured["lines_30"] > 20 and measured["csv_mb_30"] > 0
