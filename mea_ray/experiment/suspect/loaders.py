"""Files of models: how each kind is opened and queried. Runs in the suspect's own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ask = Callable[[npt.NDArray[np.float32]], Any]
Opened = tuple[Ask, dict[str, Any]]


def _onnx(path: Path, job: dict[str, Any]) -> Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise TypeError(f"the file has {len(inputs)} inputs, not one: {[each.name for each in inputs]}")
    outputs = [each.name for each in session.get_outputs()]
    named = job.get("output") or outputs[0]
    if named not in outputs:
        raise ValueError(f"the file has no output {named!r}; it has {outputs}")
    shape = [each if isinstance(each, int) else None for each in inputs[0].shape]
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    kind = kinds.get(inputs[0].type, np.uint8 if inputs[0].type == "tensor(uint8)" else np.float32)

    def ask(images: npt.NDArray[np.float32]) -> Any:
        return session.run([named], {inputs[0].name: images.astype(kind)})[0]

    return ask, {"input_shape": shape, "outputs": outputs}


def _module(module: Any) -> Ask:
    def ask(images: npt.NDArray[np.float32]) -> Any:
        given = module(torch.from_numpy(np.ascontiguousarray(images)))
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"the model returns a {type(given).__name__}, not one tensor")
        return given.detach().float().numpy() if given.is_floating_point() else given.numpy()

    return ask


def _torch_export(path: Path, job: dict[str, Any]) -> Opened:
    return _module(torch.export.load(path).module()), {}


def _torchscript(path: Path, job: dict[str, Any]) -> Opened:
    load: Any = torch.jit.load  # its annotations come and go with versions of torch
    return _module(load(str(path), map_location="cpu").eval()), {}


def _state(path: Path, job: dict[str, Any]) -> Opened:
    """A state dict, in the architecture that the job names; images are then as everywhere in mea_ray."""
    from mea_ray.models.build import build_model
    from mea_ray.models.weights import load_weights, read_state

    spec = job["architecture"]
    model = build_model(spec["name"], spec["shape"], spec["classes"], spec["params"])
    load_weights(model, read_state(path), path)
    return _module(model.eval()), {}


LOADERS: dict[str, Callable[[Path, dict[str, Any]], Opened]] = {
    "onnx": _onnx,
    "torch.export": _torch_export,
    "torchscript": _torchscript,
    "weights": _state,
}
