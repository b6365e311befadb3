"""The example package is installed as a user would install it, listed, and used in a sweep. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mea_ray

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed into."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "docs" / "example_package", folder / "source")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(folder / "site"), str(folder / "source")], check=True, timeout=300)
    return folder / "site"


def mea_ray_with(site: Path, folder: Path, *argv: str) -> str:
    """Run the command line where the package is installed; return what it prints."""
    path = os.pathsep.join([str(site), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", "RAY_TMPDIR": "/tmp"}
    command = [sys.executable, "-m", "mea_ray", *argv]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_components_are_listed_with_their_package(site: Path, tmp_path: Path) -> None:
    messages = mea_ray_with(site, tmp_path, "list", "attacks", "shifted")
    assert (
        "mea-ray-example 0.1.0" in messages and "Pixels that these are shifted" in messages and "in [0, 1]" in messages
    )


@pytest.mark.slow
def test_a_sweep_on_ray_uses_them(site: Path, tmp_path: Path) -> None:
    sweep = str(ROOT / "docs" / "example_package" / "sweep.yaml")
    messages = mea_ray_with(site, tmp_path, "sweep", sweep, f"storage={tmp_path}", "tracking.wandb=disabled")
    assert "thief.attack=shifted(" in messages.replace(" ", "") or "shifted" in messages
    frame = mea_ray.load_results(tmp_path / "example")
    stolen = frame[frame.model == "substitute"]
    assert sorted(stolen.queries) == [100, 100, 200, 200]
    assert {name.split("(")[0] for name in stolen["thief.attack"]} == {"distillation", "shifted"}
    assert set(stolen["thief.model.name"]) == {"perceptron"}
