"""Files in other people's forms: number types, fixed batches, channels last, several outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mea_ray.experiment.suspect.loaders import LOADERS, in_the_form
from mea_ray.experiment.suspect.network import arranged, fitted
from mea_ray.models.foreign import Preprocessing

SHAPE = (3, 8, 8)
X = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
JIT: Any = torch.jit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.to(self.layer.weight.dtype).mean((2, 3)))
        return out


class Bytes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 255)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits, "twice": 2 * logits}


class Pair(Several):
    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return logits, 2 * logits


def answers(kind: str, path: Path, **job: Any) -> Any:
    """Return what a file answers to ``X``, asked as `verify` asks it, in this process."""
    with torch.inference_mode():
        ask, about = LOADERS[kind](path, job)
        taken = fitted(
            Preprocessing(), SHAPE, about.get("input_shape"), whole_numbers=about.get("whole_numbers", False)
        )
        return np.asarray(ask(arranged(X, taken)))


def expected() -> Any:
    with torch.no_grad():
        return Net()(X).numpy()


@pytest.mark.slow  # torch.export takes seconds to import
@pytest.mark.parametrize("batch", [1, 2, None])
def test_an_exported_program_of_a_fixed_batch_takes_any_number_of_images(tmp_path: Path, batch: int | None) -> None:
    dynamic = ({0: torch.export.Dim("batch")},) if batch is None else None
    program = torch.export.export(Net(), (X[: batch or 2],), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "m.pt2")
    assert np.allclose(answers("torch.export", tmp_path / "m.pt2"), expected(), atol=1e-6)


@pytest.mark.slow  # torch.export takes seconds to import
def test_an_exported_program_of_bytes_gets_bytes(tmp_path: Path) -> None:
    program = torch.export.export(Bytes(), (torch.zeros(1, *SHAPE, dtype=torch.uint8),))
    torch.export.save(program, tmp_path / "m.pt2")
    assert np.allclose(answers("torch.export", tmp_path / "m.pt2"), expected(), atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_torchscript_of_another_type_gets_that_type(tmp_path: Path, dtype: torch.dtype) -> None:
    JIT.trace(Net().to(dtype), X.to(dtype)).save(str(tmp_path / "m.pt"))
    found = answers("torchscript", tmp_path / "m.pt")
    assert found.dtype == np.float32 and np.allclose(found, expected(), atol=3e-2)


@pytest.mark.parametrize(("module", "names"), [(Several(), ["logits", "twice"]), (Pair(), ["0", "1"])])
def test_one_of_several_outputs_is_named(tmp_path: Path, module: nn.Module, names: list[str]) -> None:
    JIT.trace(module, X, strict=False).save(str(tmp_path / "m.pt"))
    assert np.allclose(answers("torchscript", tmp_path / "m.pt", output=names[1]), 2 * expected(), atol=1e-5)
    with pytest.raises(TypeError, match=f"returns 2 outputs; name one with --output.*{names[0]}"):
        answers("torchscript", tmp_path / "m.pt")


def test_a_model_that_answers_another_number_of_rows_is_named() -> None:
    ask = in_the_form(lambda x: x[:1], np.float32, 2)
    with pytest.raises(ValueError, match="one row for each"):
        ask(np.zeros((3, 2), np.float32))


def onnx_file(path: Path, kind: str, shape: list[Any], *, softmax: bool) -> Path:
    """Write the network of ``Net`` with an input of a type and a shape; channels come last if the shape says so."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, numbers = onnx.helper, onnx.numpy_helper
    with torch.no_grad():
        weight, bias = (each.numpy() for each in (Net().layer.weight, Net().layer.bias))
    steps: list[tuple[str, list[str | None], dict[str, Any]]] = [("Cast", ["x"], {"to": onnx.TensorProto.FLOAT})]
    if kind == "UINT8":
        steps.append(("Div", [None, "white"], {}))
    if shape[1] != 3:
        steps.append(("Transpose", [None], {"perm": [0, 3, 1, 2]}))
    steps += [("GlobalAveragePool", [None], {}), ("Flatten", [None], {"axis": 1})]
    steps += [("Gemm", [None, "weight", "bias"], {"transB": 1})]
    steps += [("Softmax", [None], {"axis": 1})] if softmax else []
    nodes, last = [], ""
    for place, (operator, inputs, attributes) in enumerate(steps):
        named = [last if each is None else each for each in inputs]
        last = "y" if place == len(steps) - 1 else f"t{place}"
        nodes.append(helper.make_node(operator, named, [last], **attributes))
    constants = {"weight": weight, "bias": bias, "white": np.array(255, np.float32)}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", getattr(onnx.TensorProto, kind), shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [shape[0], 4])],
        [numbers.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE", "UINT8"])
@pytest.mark.parametrize("shape", [["n", 3, 8, 8], [1, 3, 8, 8], [2, 8, 8, 3], ["n", "h", "w", 3]])
@pytest.mark.parametrize("softmax", [False, True])
def test_an_onnx_file_is_queried_in_its_input_format(
    tmp_path: Path, kind: str, shape: list[Any], softmax: bool
) -> None:
    path = onnx_file(tmp_path / "m.onnx", kind, shape, softmax=softmax)
    wanted = torch.from_numpy(expected())
    wanted = wanted.softmax(1) if softmax else wanted
    assert np.allclose(answers("onnx", path), wanted, atol=5e-3)


def test_an_onnx_file_of_another_type_is_named(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", "INT32", ["n", 3, 8, 8], softmax=False)
    with pytest.raises(TypeError, match=r"takes tensor\(int32\); one of tensor\(float\)"):
        answers("onnx", path)
