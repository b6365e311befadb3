from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from mea_ray.core.errors import ArtifactError
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training.checkpoint import load_model, save_model


def make(classes: int = 5, seed: int = 0) -> ImageModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model("vgg_like", (3, 32, 32), classes, {"width": 0.1})
    model.set_normalisation([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    return model


def test_round_trip_gives_the_same_answers(tmp_path: Path) -> None:
    model = make().to(memory_format=torch.channels_last)  # such weights are not contiguous
    save_model(tmp_path / "new" / "folder", model, {"epochs": 3, "name": "é"})
    loaded, info = load_model(tmp_path / "new" / "folder")
    assert info == {"epochs": 3, "name": "é"} and loaded.spec == model.spec and not loaded.training
    model.eval().to(memory_format=torch.contiguous_format)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["model.json", "model.safetensors"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    save_model(tmp_path, make(seed=0), {"n": 1})
    save_model(tmp_path, make(seed=1), {"n": 2})
    loaded, info = load_model(tmp_path)
    assert info == {"n": 2} and torch.equal(
        loaded.state_dict()["head.weight"], make(seed=1).state_dict()["head.weight"]
    )


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "empty"])
def test_damage_is_reported(tmp_path: Path, name: str, damage: str) -> None:
    save_model(tmp_path, make(), {})
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":  # the last number of the weights; a brace of the JSON
        path.write_bytes(content[:-2] + b"\x01" + content[-1:])
    else:
        path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"spec": {"name": "vgg_like", "params": {"width": 0.1}, "shape": [3, 32, 32], "classes": 6}},
        {"spec": {"name": "no_such", "params": {}, "shape": [3, 32, 32], "classes": 5}},
        {"spec": {"name": "vgg_like", "params": {"nope": 1}, "shape": [3, 32, 32], "classes": 5}},
        {"spec": {"name": "vgg_like"}},
        {"spec": 7},
        {"spec": None},
    ],
)
def test_a_description_of_another_model_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    save_model(tmp_path, make(), {})
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError):
        load_model(tmp_path)


def test_weights_of_another_save_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "a", make(seed=0), {})
    save_model(tmp_path / "b", make(seed=1), {})
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ArtifactError, match="sha256"):
        load_model(tmp_path / "a")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "ran",)

    save_model(tmp_path, make(), {})
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArtifactError):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_cannot_be_built_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="build_model"):
        save_model(tmp_path, nn.Linear(2, 2), {})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
