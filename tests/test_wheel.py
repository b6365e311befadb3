"""What is installed without a clone: the package, its data and the sweeps."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this checkout is unpacked; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: a build folder left in the checkout may hold modules that are gone
    for part in ("mea_ray", "sweeps"):
        shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_modules_data_and_sweeps_and_nothing_else(installed: Path) -> None:
    files = (path.relative_to(installed) for path in installed.rglob("*") if path.is_file())
    there = {path.as_posix() for path in files if "__pycache__" not in path.parts}  # the other test imports it
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mea_ray").rglob("*.py")}
    sweeps = {f"mea_ray/sweeps/{path.name}" for path in (ROOT / "sweeps").glob("*.yaml")}
    assert modules | sweeps <= there
    assert {"mea_ray/py.typed", "mea_ray/report/report.css", "mea_ray/report/published.yaml"} <= there
    rest = {path for path in there - modules - sweeps if not path.startswith("mea_ray-")}
    assert {Path(path).suffix for path in rest} <= {".typed", ".css", ".j2", ".js", ".yaml"}


def test_a_sweep_is_started_by_its_name_without_a_clone(installed: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import mea_ray; from mea_ray.cli.main import main; "
    code += f"assert mea_ray.__file__.startswith({str(installed)!r}); sys.exit(main(['plan', 'quickstart']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout and "distinct victims" in done.stdout
