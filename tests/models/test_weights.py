from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.models.weights import AUTHORS_DEVIATION, AUTHORS_MEAN, load_weights, read_state

SHAPE = (1, 12, 12)


def network() -> ImageModel:
    return build_model("foreign_networks:Viewing", SHAPE, 10, {"preprocessing": {"mean": [0], "deviation": [1]}}).eval()


def inner(model: ImageModel) -> nn.Module:
    net = model.net
    assert isinstance(net, nn.Module)
    return net


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.model."])
@pytest.mark.parametrize("key", [None, "state_dict", "net_state_dict", "model"])
def test_a_checkpoint_is_opened_however_its_script_wrapped_it(tmp_path: Path, prefix: str, key: str | None) -> None:
    trained = network()
    state: Any = {f"{prefix}{name}": value for name, value in inner(trained).state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    loaded = network()
    load_weights(loaded, read_state(tmp_path / "w.pt"), "w.pt")
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(x), trained(x))


def test_safetensors_are_read_and_a_network_of_ours_keeps_its_normalisation(tmp_path: Path) -> None:
    trained, loaded = (build_model("vgg_like", SHAPE, 10, {"width": 0.0625}).eval() for _ in range(2))
    bare = {name: value for name, value in trained.state_dict().items() if name not in {"mean", "std"}}
    save_file(bare, tmp_path / "w.safetensors")
    loaded.set_normalisation([0.3], [0.2])
    load_weights(loaded, read_state(tmp_path / "w.safetensors"), "w")
    assert float(loaded.mean) == pytest.approx(0.3)
    trained.set_normalisation([0.3], [0.2])
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(x), trained(x))


class AuthorsNet(nn.Module):
    """As the authors' network is laid out, written from its description."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 64), (64, 64), (64, 128), (128, 128)]
        layers: list[nn.Module] = []
        for position, (inputs, outputs) in enumerate(sizes):
            layers += [nn.Conv2d(inputs, outputs, 3), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if position % 2 else []
        self.m1 = nn.Sequential(*layers)
        hidden = [nn.Linear(3200, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        self.m2 = nn.Sequential(nn.Dropout(0.5), *hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.m2(self.m1(x).view(len(x), -1))
        return out


def test_a_checkpoint_of_the_authors_answers_as_their_network_does(tmp_path: Path) -> None:
    theirs = AuthorsNet().eval()
    torch.save({"net_state_dict": theirs.state_dict(), "epoch": 99}, tmp_path / "ckpt_99_poison.pth.tar")
    ours = build_model("vgg_like", (3, 32, 32), 10).eval()
    load_weights(ours, read_state(tmp_path / "ckpt_99_poison.pth.tar"), "ckpt")
    x = torch.rand(2, 3, 32, 32)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (AUTHORS_MEAN, AUTHORS_DEVIATION))
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs((x - mean) / deviation), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("m2.2.bias"), "m2.2.bias is missing"),
        (lambda state: state.update({"extra": torch.zeros(1)}), "extra is not the network's"),
        (lambda state: state.update({"m2.2.bias": torch.zeros(7)}), r"m2.2.bias is \(7,\), not \(10,\)"),
        (lambda state: state["m2.2.bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, words: str) -> None:
    state = {name: value.clone() for name, value in inner(network()).state_dict().items()}
    change(state)
    with pytest.raises(ConfigError, match=words):
        load_weights(network(), state, "w.pt")


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Bomb()),
        pickle.dumps({"state_dict": {"a": Bomb()}}, protocol=4),
        b"",
        b"\x80\x02garbage",
        b"PK\x03\x04 not a zip",
        b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}",
        b"\xff" * 64,
    ],
)
def test_hostile_and_damaged_files_are_refused_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="can be read safely"):
            read_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(ArtifactError, match="read safely.*safetensors"):
        read_state(tmp_path / "whole.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ArtifactError, match="no state dict.*epoch"):
        read_state(tmp_path / "none.pt")


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    for path in (tmp_path / "w.pt", Path("/dev/zero")):
        with pytest.raises(ArtifactError, match="no weights that can be read safely: OSError: it is a pipe, a socket"):
            read_state(path)
