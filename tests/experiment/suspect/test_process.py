"""Files of suspects in a process of their own. Each test starts one or more, which takes seconds."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mea_ray.config import ModelChoice
from mea_ray.core.errors import ArtifactError, ConfigError, MeaRayError, SuspectError
from mea_ray.experiment.suspect.opening import HowToOpen, class_map, kind_of_source, opened
from mea_ray.experiment.suspect.process import Limits, SuspectProcess
from mea_ray.models.build import build_model
from mea_ray.training.checkpoint import save_model

SHAPE = (1, 12, 12)
JIT: Any = torch.jit
"""Typed in some versions of torch and untyped in others."""
X = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)
HOW = HowToOpen(ModelChoice(name="cnn9", width=0.0625), SHAPE, 10)


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while bool(x.sum() > -1):
            x = x + 0
        return x


class Bomb(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(100_000_000_000).sum() + x  # TorchScript takes 10**11 for a float


class Short(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:1]


def script(module: nn.Module, path: Path) -> Path:
    JIT.script(module).save(str(path))
    return path


@pytest.mark.slow
def test_every_kind_of_file_answers_as_the_network_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from mea_ray.experiment.victim.export import write_copies

    model = build_model("cnn9", SHAPE, 10, {"width": 0.0625}).eval()
    write_copies(tmp_path, model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    JIT.trace(model, torch.from_numpy(X)).save(str(tmp_path / "s.pt"))
    save_model(tmp_path / "folder", model, {})
    with torch.no_grad():
        expected = model(torch.from_numpy(X)).numpy()
    for name, kind in (
        ("model.onnx", "onnx"),
        ("model.pt2", "torch.export"),
        ("w.pt", "weights"),
        ("s.pt", "torchscript"),
        ("folder", "model folder"),
    ):
        with opened(str(tmp_path / name), HOW) as (ask, source):
            assert source.kind == kind and np.allclose(ask(X), expected, atol=1e-4)
            assert kind == "model folder" or (source.network in {"namespace", "python"} and len(source.sha256) == 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "limits", "words"),
    [
        (Endless(), Limits(answer_s=20), "took more than 20 s"),
        (Endless(), Limits(cpu_s=12), "ended its process"),
        (Bomb(), Limits(memory_gb=12), "failed|ended its process"),
        (Short(), Limits(), "one row per image"),
    ],
)
def test_a_file_that_misbehaves_is_ended_and_named(
    tmp_path: Path, module: nn.Module, limits: Limits, words: str
) -> None:
    path = script(module, tmp_path / "m.pt")
    with pytest.raises(SuspectError, match=words), SuspectProcess("torchscript", path, limits) as process:
        process.ask(X)


@pytest.mark.slow
def test_files_that_hold_code_or_nothing_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    for name, content in (
        ("evil.pt", pickle.dumps({"state_dict": Evil()})),
        ("evil.pt2", pickle.dumps(Evil())),
        ("broken.onnx", b"\x08\x07broken"),
        ("empty.safetensors", b""),
        ("zip.pt", b"PK\x05\x06" + b"\0" * 18),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MeaRayError), opened(str(tmp_path / name), HOW):
            pass
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("forced", [False, True])
def test_the_process_has_no_network(forced: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = (
            "import socket\nfrom mea_ray.experiment.suspect import worker\n"
            + ("worker.sys.platform = 'other'\n" if forced else "")
            + "print(worker.without_network())\n"
            f"try:\n    socket.create_connection(('127.0.0.1', {port}), timeout=3)\n    print('connected')\n"
            "except OSError as error:\n    print('refused')\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "refused"
    assert done.stdout.split()[0] == "python" if forced else True


def test_a_folder_that_names_a_network_of_its_own_is_not_imported(tmp_path: Path) -> None:
    model = build_model("foreign_networks:Viewing", SHAPE, 10)
    save_model(tmp_path, model, {})
    with pytest.raises(ArtifactError, match="would be imported"), opened(str(tmp_path), HOW):
        pass


def answering(images: Any) -> Any:
    return images.reshape(len(images), -1)[:, :10]


def failing(images: Any) -> Any:
    return "no"


def test_a_function_is_called_in_this_process() -> None:
    with opened("test_process:answering" if __name__ == "test_process" else f"{__name__}:answering", HOW) as (
        ask,
        source,
    ):
        assert source.kind == "function" and ask(X).shape == (5, 10)
    with opened(f"{__name__}:failing", HOW) as (ask, _), pytest.raises(SuspectError, match="one row of class scores"):
        ask(X)


@pytest.mark.parametrize("text", ["nothing.here", "no/such/file.onnx", "../x", ""])
def test_what_is_no_suspect_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a file, a folder, a URL|a folder without"):
        kind_of_source(text)


def test_class_maps_are_read(tmp_path: Path) -> None:
    (tmp_path / "names.yaml").write_text("[cat, dog]")
    (tmp_path / "columns.json").write_text('{"cat": 1, "dog": 0}')
    (tmp_path / "bad.yaml").write_text("3")
    assert class_map(None) == (None, False) and class_map("match") == (None, True)
    assert class_map(str(tmp_path / "names.yaml")) == (["cat", "dog"], False)
    assert class_map(str(tmp_path / "columns.json")) == ({"cat": 1, "dog": 0}, False)
    for name in ("bad.yaml", "none.yaml"):
        with pytest.raises(ConfigError, match="--classes"):
            class_map(str(tmp_path / name))
    (tmp_path / "marked.yaml").write_bytes("[cat, dog]\r\n".encode("utf-8-sig"))
    assert class_map(str(tmp_path / "marked.yaml")) == (["cat", "dog"], False)
    for name in ("/dev/zero", "a\0b"):  # without an end; no path
        with pytest.raises(ConfigError, match="cannot be read"):
            class_map(name)
