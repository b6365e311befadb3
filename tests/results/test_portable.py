"""What may be published holds no path, no storage and no account."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pictures import class_folders
from tiny import TINY

from mea_ray.cli import main as cli
from mea_ray.cli.options import OK
from mea_ray.config import ExperimentConfig, build
from mea_ray.experiment.local import run_in_memory, run_local
from mea_ray.report.html import write
from mea_ray.results.portable import anonymous, cleaned, portable, portable_point


def test_a_config_without_folders_and_accounts() -> None:
    config = {
        "storage": "s3://bucket/ann",
        "data": {"name": "parquet", "path": "/home/ann/cifar10"},
        "splits": {"thief_pool": {"name": "mixture", "parts": [{"name": "image_folder", "path": "~ann/pool/"}]}},
        "resources": {"py_modules": ("/home/ann/mine.py",)},
        "tracking": {"wandb": "online", "entity": "ann", "group": "anns", "project": "marks"},
        "thief": {"blackbox": {"url": "https://api.example.org/v1/predict", "key": ("env:KEY",)}},
    }
    assert anonymous(config) == {
        "data": {"name": "parquet", "path": "cifar10"},
        "splits": {"thief_pool": {"name": "mixture", "parts": [{"name": "image_folder", "path": "pool"}]}},
        "resources": {"py_modules": ["mine.py"]},
        "tracking": {"wandb": "online", "project": "marks"},
        "thief": {"blackbox": {"url": "https://api.example.org/v1/predict", "key": ["env:KEY"]}},
    }


@pytest.mark.parametrize("text", ["plain", "3/4", "a/b.yaml", "https://x.org/a", "1 / 2"])
def test_texts_without_folders_stay(text: str) -> None:
    assert cleaned(text) == text


def test_a_command_names_its_files_only() -> None:
    typed = "mea-ray run /home/ann/a.yaml data.path=/data/set storage=/scratch/ann seed=3"
    assert portable(typed) == "mea-ray run a.yaml data.path=set seed=3"


def experiment(tmp_path: Path) -> dict[str, Any]:
    return {
        "storage": str(tmp_path / "store"),
        "data": {"name": "image_folder", "path": str(tmp_path / "secret_place" / "set"), "image_size": 12},
        "victim": {"model": TINY, "training": {"epochs": 1}},
        "thief": {"model": TINY, "budgets": [8], "training": {"epochs": 1}},
        "verification": {"samples": 30},
        "splits": {"verification_fraction": 0.5},
    }


def test_a_result_says_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    class_folders(tmp_path / "secret_place" / "set", count=60)
    result = run_in_memory(build(ExperimentConfig, experiment(tmp_path)))
    assert result.config["data"]["path"] == "set" and "storage" not in result.config
    assert str(tmp_path) not in result.model_dump_json() and "secret_place" not in result.model_dump_json()


@pytest.mark.slow
def test_results_and_reports_name_no_folder_and_no_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pictures of the report are made from the data all the same."""
    class_folders(tmp_path / "secret_place" / "set", count=60)
    run = run_local(build(ExperimentConfig, experiment(tmp_path)))
    (result,) = (run.folder / "results").iterdir()
    page = write(run.folder)
    assert cli.main(["report", str(run.folder), "--csv"]) == OK
    for text in (result.read_text(encoding="utf-8"), page.read_text(encoding="utf-8"), capsys.readouterr().out):
        assert str(tmp_path) not in text and "secret_place" not in text
    assert "watermark samples" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/home/o'neil/my data, new/set", "set"),
        ("/home/ann/a b", "a b"),
        ("~/ann's set/", "ann's set"),
        ("~ann/x", "x"),
        ("s3://ann-bucket/a b/c", "c"),
        ("/x", "x"),
    ],
)
def test_a_path_is_cut_as_a_whole_whatever_is_in_it(path: str, last: str) -> None:
    assert cleaned({"path": [path]}) == {"path": [last]}


def test_points_name_no_folder_and_stay_apart() -> None:
    point = {"data.path": "/home/ann/v1/set", "data": [{"path": "/home/ann/v2/set"}], "seed": 3, "storage": "sub/set"}
    cleaned_point = portable_point(point)
    assert "ann" not in str(cleaned_point) and "home" not in str(cleaned_point)
    assert cleaned_point["data.path"].startswith("set~") and cleaned_point["data"][0]["path"].startswith("set~")
    assert cleaned_point["data.path"] != cleaned_point["data"][0]["path"]
    assert (cleaned_point["seed"], cleaned_point["storage"]) == (3, "sub/set")
    assert portable_point(cleaned_point) == cleaned_point
