"""The public Python surface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_networks import Viewing
from PIL import Image
from tiny import TINY

import mea_ray
from mea_ray import api
from mea_ray.api.settings import dataset, experiment, network
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import DataChoice, ExperimentConfig, build
from mea_ray.core.errors import ConfigError, DataError, OverBudget
from mea_ray.core.types import BlackBox, Dataset
from mea_ray.models.build import build_model


def test_the_front_door_names_what_the_surface_offers_and_imports_nothing_before() -> None:
    assert {*mea_ray.__all__} - {"__version__"} == {*api.__all__}
    assert mea_ray.watermark is api.watermark and mea_ray.load_results is api.load_results
    code = "import sys, mea_ray; print('torch' in sys.modules, 'mea_ray.api' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'watermarc'"):
        _ = mea_ray.watermarc


class Pictures:
    """A dataset in torchvision's style."""

    classes = ("cat", "dog")

    def __init__(self, kind: str, count: int = 12) -> None:
        self.kind, self.count = kind, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = np.full((10, 10, 3), 20 * index, np.uint8)
        pixels[..., 1] = 7
        picture = Image.fromarray(pixels)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        forms = {"picture": picture, "tensor": tensor.float() / 255, "bytes": tensor, "normalised": tensor.float() - 1}
        return forms[self.kind], index % 2


@pytest.mark.parametrize("kind", ["picture", "tensor", "bytes"])
def test_a_torchvision_style_dataset_is_written_once_and_loaded_by_its_content(tmp_path: Path, kind: str) -> None:
    named = dataset((Pictures(kind), Pictures(kind, 4)), tmp_path, None)
    assert isinstance(named, dict) and named["name"] == "arrays"
    loaded: Dataset = build(DataChoice, named).build()
    assert loaded.train.class_names == ("cat", "dog") and loaded.train.shape == (3, 10, 10)
    assert loaded.train.images[3, :, 0, 0].tolist() == [60, 7, 60] and loaded.test.labels.tolist() == [0, 1, 0, 1]
    assert dataset((Pictures("picture"), Pictures("picture", 4)), tmp_path, None) == named
    assert len(list((tmp_path / "datasets").iterdir())) == 1


def test_normalised_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave a Normalize out"):
        dataset((Pictures("normalised"), Pictures("picture")), tmp_path, None)


def test_networks_and_experiments_are_named_as_in_a_config(tmp_path: Path) -> None:
    assert network(Viewing) == "foreign_networks:Viewing" and network("cnn9") == "cnn9"

    class Inner(Viewing):
        pass

    with pytest.raises(ConfigError, match="top of a module"):
        network(Inner)
    (tmp_path / "e.yaml").write_text("seed: 3")
    assert experiment(tmp_path / "e.yaml").seed == experiment({"seed": 3}).seed == 3
    assert experiment(None) == ExperimentConfig()


def test_a_black_box_is_stolen_within_its_budget() -> None:
    model = build_model("foreign_networks:Viewing", (1, 12, 12), 10)
    images = np.random.default_rng(0).integers(0, 256, (80, 1, 12, 12), dtype=np.uint8)
    blackbox: BlackBox = LocalBlackBox(model)
    training = {"epochs": 1, "augment": []}
    stolen = api.steal(blackbox, images, budgets=[20, 40], model=TINY, training=training, progress=False)
    assert [(each.budget, each.queries) for each in stolen] == [(20, 20), (40, 40)]
    assert stolen[1].model(torch.rand(2, 1, 12, 12)).shape == (2, 10)
    again = api.steal(LocalBlackBox(model), images, budgets=[20], model=TINY, training=training, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(again[0].model.parameters(), stolen[0].model.parameters(), strict=True)
    )
    with pytest.raises(ConfigError):
        api.steal(blackbox, images, budgets=[100], model=TINY, training=training, progress=False)


def test_a_victim_is_made_served_within_a_budget_and_run_from_settings(tmp_path: Path) -> None:
    settings = {
        "data": {"name": "digits", "image_size": 12},
        "thief": {"budgets": [32], "model": TINY, "training": {"epochs": 1}},
        "verification": {"samples": 50},
        "storage": str(tmp_path),
    }
    training = {"epochs": 1, "augment": []}
    victim = api.watermark(model=Viewing, config=settings, training=training, name="d", progress=False)
    assert victim.name == "d" and victim.config.victim.model.name == "foreign_networks:Viewing"
    blackbox = api.open_blackbox(victim, budget=3)
    images = np.zeros((2, 1, 12, 12), np.uint8)
    assert blackbox.query(images).shape == (2, 10) and blackbox.remaining == 1
    with pytest.raises(OverBudget):
        blackbox.query(images)
