"""A thief's pool needs no classes, no test part and no labels; everything but a policy over its classes works on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pictures import class_folders, encoded, image_files, picture, table

from mea_ray.config import DataChoice, ExperimentConfig, build
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import UNLABELLED, Dataset, Splits
from mea_ray.data import DATASETS
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import load_splits
from mea_ray.removal.transfer_learning import TransferLearning


def flat(root: Path) -> dict[str, Any]:
    image_files(root / "flat", 12)
    return {"name": "image_folder", "path": str(root / "flat"), "image_size": 16}


def train_only(root: Path) -> dict[str, Any]:
    class_folders(root / "only" / "train", ("a", "b"), 6)
    return {"name": "image_folder", "path": str(root / "only"), "image_size": 16}


def minus_one(root: Path) -> dict[str, Any]:
    for number, part in enumerate(("train", "test")):
        table(root / "minus" / f"{part}.parquet", [-1] * 12, seed=50 * number)
    return {"name": "parquet", "path": str(root / "minus")}


def no_column(root: Path) -> dict[str, Any]:
    for number, part in enumerate(("train", "test")):
        table(root / "none" / f"{part}.parquet", None, bars=[1] * 12, seed=50 * number)
    return {"name": "parquet", "path": str(root / "none")}


def nulls(root: Path) -> dict[str, Any]:
    table(root / "nulls.parquet", [None, "a"] * 6)
    return {"name": "parquet", "path": str(root / "nulls.parquet")}


def other_type(root: Path) -> dict[str, Any]:
    table(root / "boxes" / "data.parquet", [[0.5, 0.5]] * 12)
    return {"name": "parquet", "path": str(root / "boxes")}


POOLS = [flat, train_only, minus_one, no_column, nulls, other_type]
SMALL = {"name": "vgg_like", "width": 0.1}


def experiment(pool: Any, attack: Any = "distillation", **data: Any) -> ExperimentConfig:
    tree = {
        "data": {"name": "digits", **data},
        "splits": {"thief_pool": pool},
        "victim": {"model": SMALL, "watermark": "none"},
        "thief": {"model": SMALL, "attack": attack, "budgets": [8]},
    }
    return build(ExperimentConfig, tree)


def checked(config: ExperimentConfig) -> Splits:
    """Load and check an experiment as a run does before it trains."""
    data = load_splits(config)
    check(config, data)
    return data


@pytest.mark.parametrize("make", POOLS)
def test_images_alone_are_a_pool(tmp_path: Path, make: Any) -> None:
    settings = make(tmp_path)
    data = checked(experiment(settings))
    pool = data.thief_pool
    assert len(pool) == 12 and pool.shape == data.shape == (1, 16, 16)
    assert data.pool_fingerprint == DATASETS.build(**settings).fingerprint
    want = [encoded(picture(1, seed)) for seed in range(12)]
    assert len({image.tobytes() for image in pool.images}) == len(set(want))


@pytest.mark.parametrize("make", POOLS)
def test_as_data_they_are_refused_with_what_is_missing(tmp_path: Path, make: Any) -> None:
    loaded: Dataset = DATASETS.build(**make(tmp_path))
    tree = {"data": make(tmp_path), "victim": {"model": SMALL, "watermark": "none"}, "thief": {"budgets": [8]}}
    with pytest.raises(DataError) as caught:
        load_splits(build(ExperimentConfig, tree))
    assert str(caught.value) == loaded.pool_only and str(tmp_path) in loaded.pool_only


@pytest.mark.parametrize("make", [flat, minus_one, no_column])
def test_a_policy_over_classes_says_that_there_are_none(tmp_path: Path, make: Any) -> None:
    pool = make(tmp_path)
    with pytest.raises(ConfigError, match="reads the labels of the thief's pool, which has none; choose"):
        checked(experiment(pool, {"name": "knockoff", "policy": "adaptive"}))
    checked(experiment(pool, {"name": "knockoff", "policy": "random"}))
    checked(experiment(train_only(tmp_path), {"name": "knockoff", "policy": "adaptive"}))


def test_part_of_a_mixture(tmp_path: Path) -> None:
    parts = [{"name": "digits", "limit": 5}, flat(tmp_path), train_only(tmp_path)]
    loaded: Dataset = DATASETS.build("mixture", parts=parts)
    assert loaded.train.class_names == (*(f"digits/{i}" for i in range(10)), "image_folder.3/a", "image_folder.3/b")
    assert loaded.train.labels[5:].tolist() == [UNLABELLED] * 12 + [10] * 6 + [11] * 6
    assert loaded.pool_only.startswith("data.parts: image_folder.2: ")
    assert len(checked(experiment({"name": "mixture", "parts": parts})).thief_pool) == 29


def test_errors_of_the_pool_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^splits.thief_pool .*there is no folder .*nowhere"):
        load_splits(experiment({"name": "image_folder", "path": str(tmp_path / "nowhere")}))


def test_a_removal_that_learns_classes_refuses_images_without(tmp_path: Path) -> None:
    removal = TransferLearning(dataset=DataChoice.model_validate(flat(tmp_path)))
    with pytest.raises(DataError, match="has images and no folders of classes"):
        removal.other((1, 16, 16), 0)
