"""Mapped data: each process of a sweep opens the files, so that neither memory nor Ray's object store holds them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from pictures import class_folders
from tiny import tiny_sweep

from mea_ray.config import ExperimentConfig, build
from mea_ray.core import mapped
from mea_ray.results.frames import load_results
from mea_ray.sweep.trainable import SharedData, load_data

COUNT, SHAPE = 40_000, (3, 64, 64)
TRAINS = f"""
import resource, sys
import numpy as np
from torch import nn
from mea_ray.config import TrainingConfig
from mea_ray.training.engine import train
from mea_ray.training.objective import CrossEntropy

images = np.memmap(sys.argv[1], np.uint8, "r", shape=({COUNT}, *{SHAPE}))
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = used + images.nbytes // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if sys.argv[2] == "in memory":
    images = np.array(images)
model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(48, 2))
training = TrainingConfig(epochs=1, batch_size=256, augment=())
report = train(model, images, np.arange({COUNT}) % 2, CrossEntropy(), training, seed=0)
print("images", report.images)
"""


def config(path: Path, in_memory: bool) -> ExperimentConfig:
    data = {"name": "image_folder", "path": str(path), "image_size": 32, "in_memory": in_memory}
    return build(ExperimentConfig, {"data": data, "victim": {"watermark": "none"}})


def test_mapped_data_travel_as_the_settings_that_open_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    class_folders(tmp_path / "photos", count=60)
    here, there = (load_data(config(tmp_path / "photos", in_memory)) for in_memory in (True, False))
    assert here.splits is not None and there.splits is None
    images = here.splits.victim_train.images.nbytes
    assert len(pickle.dumps(there)) < 20_000 < images < len(pickle.dumps(here))
    received: SharedData = pickle.loads(pickle.dumps(there))  # noqa: S301
    one, other = here.open(), received.open()
    for name in ("victim_train", "thief_pool", "verification", "test"):
        assert mapped.is_mapped(getattr(other, name).images)
        assert np.array_equal(getattr(one, name).images, getattr(other, name).images)
    again = there.open()  # of another process of this machine
    assert _file(again) == _file(other), "one file for both"


def _file(data: Any) -> tuple[int, int]:
    status = Path(data.victim_train.images.filename).stat()
    return status.st_dev, status.st_ino


@pytest.mark.slow
def test_a_sweep_on_mapped_images_gives_the_results_of_images_in_memory(tmp_path: Path) -> None:
    for split, count in (("train", 60), ("test", 40)):
        class_folders(tmp_path / "photos" / split, "abcde", count, first=0 if split == "train" else 1000)
    tree = tiny_sweep(tmp_path, space={"seed": {"grid": [0, 1]}}).model_dump(mode="json")
    tree["base"]["service"]["rate"] = None
    results = {}
    for in_memory in (True, False):
        data = {"name": "image_folder", "path": str(tmp_path / "photos"), "image_size": 16, "in_memory": in_memory}
        tree["base"] |= {"data": data, "storage": str(tmp_path / str(in_memory))}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
        done = subprocess.run(
            [sys.executable, "-m", "mea_ray", "sweep", str(tmp_path / "sweep.yaml")],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        loaded = load_results(tmp_path / str(in_memory) / "s")
        columns = ["trial", "model", "budget", "removal", "victim", "accuracy", "fidelity", "wsr", "wfpr"]
        results[in_memory] = loaded[columns].sort_values(columns, ignore_index=True)
    assert set(results[True].budget.dropna()) == {48, 96} and results[True].trial.nunique() == 2
    pd.testing.assert_frame_equal(results[True], results[False])
    parts = [path for path in (tmp_path / "cache" / "mea_ray" / "image_parts").rglob("*") if path.is_file()]
    assert parts, "the processes of the sweep shared files"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_training_on_mapped_images_takes_less_memory_than_the_images(tmp_path: Path) -> None:
    path = tmp_path / "images"
    with path.open("wb") as file:
        file.truncate(COUNT * int(np.prod(SHAPE)))  # half a gigabyte of zeros that takes no disk

    def run(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", TRAINS, str(path), how], capture_output=True, text=True, timeout=300, check=False
        )

    done = run("mapped")
    assert done.returncode == 0 and f"images {COUNT}" in done.stdout, done.stderr
    refused = run("in memory")
    assert refused.returncode != 0 and "MemoryError" in refused.stderr, "the limit holds"
