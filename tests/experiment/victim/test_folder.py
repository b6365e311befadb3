from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, config

from mea_ray.config import DataChoice, ExperimentConfig
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.experiment.local import run_local
from mea_ray.experiment.victim import Victim
from mea_ray.experiment.victim.card import card_text, cost_of_mark
from mea_ray.experiment.victim.export import ONNX, TORCH_EXPORT, onnx_installed
from mea_ray.experiment.victim.make import anchored, make_victim, victim_of_artifact
from mea_ray.results.records import ModelReport
from mea_ray.training.checkpoint import check_model


def small(storage: Path) -> ExperimentConfig:
    changes = {"victim__training__epochs": 1, "thief__training__epochs": 1, "thief__budgets": [64]}
    return config(storage=str(storage), victim__model=TINY, thief__model=TINY, verification__samples=60, **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return make_victim(small(tmp_path_factory.mktemp("storage")), "flowers")


def test_a_saved_victim_is_loaded_as_it_was(made: Victim, tmp_path: Path) -> None:
    saved = made.save(tmp_path / "roses", copies=False)
    loaded = Victim.load(tmp_path / "roses")
    assert loaded.name == saved.name == "roses" and loaded.folder == saved.folder == tmp_path / "roses"
    assert loaded.about == saved.about and loaded.owner == made.owner and loaded.config == made.config
    assert made.key is not None and loaded.key is not None and loaded.key.settings == made.key.settings
    images = torch.rand(3, *made.shape)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), made.model(images))


def test_the_owners_part_is_closed_to_others_and_nothing_else_names_the_key(made: Victim, tmp_path: Path) -> None:
    folder = made.save(tmp_path / "v", copies=False).require_folder()
    owner = folder / "owner"
    assert owner.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in owner.iterdir()} == dict.fromkeys(
        ("key.json", "config.yaml", "report.json"), 0o600
    )
    public = "".join(path.read_text() for path in folder.iterdir() if path.suffix in {".json", ".md"})
    assert made.owner.artifact not in public, "a hash of the settings gives the key's classes away to who tries them"
    assert "source_classes" not in public and "target_class" not in public and "source_accuracy" not in public


def test_the_record_says_how_to_use_the_network(made: Victim, tmp_path: Path) -> None:
    folder = made.save(tmp_path / "v", copies=False).require_folder()
    about = json.loads((folder / "victim.json").read_text())
    assert about["class_names"] == [str(digit) for digit in range(10)]
    image = about["preprocessing"]
    assert (image["channels"], image["height"], image["width"], image["channel_order"]) == (1, 12, 12, "grey")
    assert image["value_range"] == [0, 1] and np.allclose(image["mean"], made.model.mean.flatten())
    assert about["weights_sha256"] in (folder / "card.md").read_text()
    assert f"{100 * made.report.accuracy:.1f}%" in (folder / "card.md").read_text()


def test_a_folder_that_holds_something_is_not_overwritten(made: Victim, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("important")
    with pytest.raises(ConfigError, match="not empty"):
        made.save(tmp_path, copies=False)
    assert (tmp_path / "mine").read_text() == "important" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["victim.json", "model.safetensors", "model.json", "owner/config.yaml"])
@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_damage_is_named(made: Victim, tmp_path: Path, name: str, damage: str) -> None:
    path = made.save(tmp_path / "v", copies=False).require_folder() / name
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] + b"\x00" * 20)
    with pytest.raises(ArtifactError):
        Victim.load(tmp_path / "v")


def test_weights_of_another_victim_are_refused(made: Victim, tmp_path: Path) -> None:
    folder = made.save(tmp_path / "v", copies=False).require_folder()
    from mea_ray.training.checkpoint import save_model

    with torch.no_grad():
        other = Victim.load(folder).model
        next(other.parameters()).add_(1)
    save_model(folder, other, {})
    check_model(folder)
    with pytest.raises(ArtifactError, match="not what victim.json describes"):
        Victim.load(folder)


def test_artifacts_of_a_local_run_become_the_same_victim(tmp_path: Path) -> None:
    settings = small(tmp_path)
    result = run_local(settings).result
    of_artifact = victim_of_artifact(tmp_path / "artifacts" / "victims" / result.victim)
    trained = make_victim(settings)
    assert of_artifact.owner == trained.owner and of_artifact.owner.artifact == result.victim
    assert of_artifact.report.accuracy == result.victim_report.accuracy
    assert of_artifact.report.wsr == result.victim_report.wsr
    with pytest.raises(ArtifactError, match="not the artifact of a victim"):
        victim_of_artifact(tmp_path)


def test_every_path_of_a_saved_victim_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("own", "pool", "other"):
        (tmp_path / name).mkdir()
    inside = {"name": "mixture", "parts": [{"name": "image_folder", "path": "pool"}, {"name": "digits"}]}
    given = config(
        storage="results",
        data={"name": "parquet", "path": ["own", "nowhere*.parquet"]},
        splits__thief_pool=inside,
        removal__methods=[
            {"name": "transfer_learning", "dataset": {"name": "image_folder", "path": "other"}},
            "fine_tuning",
        ],
    )
    read = anchored(given)
    assert read.storage == str(tmp_path / "results")
    assert read.data.params["path"] == (str(tmp_path / "own"), "nowhere*.parquet")
    assert isinstance(read.splits.thief_pool, DataChoice)
    assert [part.params.get("path") for part in read.splits.thief_pool.params["parts"]] == [
        str(tmp_path / "pool"),
        None,
    ]
    assert read.removal.methods[0].params["dataset"].params["path"] == str(tmp_path / "other")
    assert anchored(read) == read


def test_cost_of_the_mark_is_the_mean_difference() -> None:
    ours = ModelReport(accuracy=0.9, source_accuracy={"a": 0.8, "b": 0.9}, calibration_error=0.10)
    nulls = [
        ModelReport(accuracy=0.9, source_accuracy={"a": 0.9, "b": 0.9}, calibration_error=0.04),
        ModelReport(accuracy=0.9, source_accuracy={"a": 1.0, "b": 0.8}, calibration_error=0.02),
    ]
    cost: tuple[Any, Any] = cost_of_mark(ours, nulls)
    assert cost == (pytest.approx((0.1 + 0.0 + 0.2 - 0.1) / 4), pytest.approx(0.07))
    assert cost_of_mark(ours, []) == (None, None)


def test_the_card_compares_where_there_is_something_to_compare_with(made: Victim) -> None:
    assert "before the mark" not in card_text(made.about)
    card = made.about.card.model_copy(update={"accuracy_before": 0.5, "source_cost": 0.031, "calibration_cost": 0.01})
    text = card_text(made.about.model_copy(update={"card": card}))
    assert "| accuracy before the mark | 50.0% |" in text and "3.1 points" in text and "+0.010" in text


@pytest.mark.slow
def test_the_exported_copies_answer_as_the_network_does(made: Victim, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert onnx_installed()
    saved = made.save(tmp_path / "v")
    assert set(saved.about.exports) == {ONNX, TORCH_EXPORT}
    images = torch.rand(7, *made.shape)
    with torch.no_grad():
        expected = made.model(images).numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "v" / ONNX))
    assert np.allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-4)
    program = torch.export.load(tmp_path / "v" / TORCH_EXPORT).module()
    assert np.allclose(program(images).detach().numpy(), expected, atol=1e-4)
