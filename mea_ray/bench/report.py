"""Cost of the report of a large sweep: CPU time and memory of ``mea-ray report``, size of its page, terminal lines.

The results are drawn (``drawn_results``), every point distinct; each report is made by a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_ray.bench.drawn_results import write_drawn
from mea_ray.core.errors import ConfigError, MeaRayError

WIDTH = 80
"""Columns of the terminal that is printed to."""


def bench_report(
    *,
    points: Sequence[int] = (100, 1000, 5000),
    folder: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Draw the results of sweeps and make their reports.

    Args:
        points: Distinct points of each sweep, one trial each.
        folder: Where the sweeps are kept; removed afterwards when None.
        on_progress: Called with what was measured, after each sweep.

    Returns:
        For each number N of points: ``cpu_s_N`` (user and system time of the process, its start and imports included),
        ``peak_mib_N`` (its memory), ``page_mb_N``, ``csv_mb_N`` (megabytes of the files), ``lines_N`` (lines printed).

    Raises:
        ConfigError: A number of points is not positive.
        MeaRayError: A report could not be made; the message has the end of what was printed.
    """
    if not points or min(points) < 1:
        raise ConfigError(f"points={list(points)} must name at least one number, each at least 1")
    notify = on_progress or (lambda text: None)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mea_ray_bench_") as aside:
        for count in points:
            sweep = Path(folder or aside).absolute() / f"report-{count}"
            write_drawn(sweep, count)
            for name, value in _report(sweep).items():
                measured[f"{name}_{count}"] = value
            notify(f"{count:,} points: {measured[f'cpu_s_{count}']:.1f} s, {measured[f'page_mb_{count}']:.2f} MB")
    return {**measured, "cpus": os.cpu_count(), "load": os.getloadavg()[0], "points": list(points)}


def table(measured: Mapping[str, Any]) -> str:
    """Return what was measured as a table in Markdown."""
    lines = [
        "| points | CPU, s | memory, MiB | page, MB | CSV, MB | lines at 80 columns |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in measured["points"]:
        cpu, memory, page, csv, printed = (
            measured[f"{name}_{count}"] for name in ("cpu_s", "peak_mib", "page_mb", "csv_mb", "lines")
        )
        lines.append(f"| {count:,} | {cpu:.1f} | {memory:,.0f} | {page:.2f} | {csv:.2f} | {printed} |")
    return "\n".join(lines)


def _report(sweep: Path) -> dict[str, float | int]:
    root = str(Path(__file__).parents[2])  # works from a checkout that is not installed, too
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": str(WIDTH), "OMP_NUM_THREADS": "1"}
    printed = sweep / "printed.txt"
    with printed.open("wb") as file:
        command = [sys.executable, "-m", "mea_ray", "report", str(sweep)]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    text = printed.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        raise MeaRayError(f"`mea-ray report {sweep}` ended with exit code {process.returncode}:\n{text[-2000:]}")
    table = sweep / "report.csv"
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        "page_mb": (sweep / "report.html").stat().st_size / 1e6,
        "csv_mb": table.stat().st_size / 1e6 if table.exists() else 0.0,
        "lines": len(text.splitlines()),
    }
