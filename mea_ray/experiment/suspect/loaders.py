"""Files of models: how each kind is opened and queried. Runs in the suspect's own process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Ask = Callable[[npt.NDArray[np.float32]], Any]
Opened = tuple[Ask, dict[str, Any]]

_ONNX_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
"""Maps input types of ONNX to those of numpy."""


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
    shape = [each if isinstance(each, int) and each > 0 else None for each in inputs[0].shape]
    kind = _ONNX_TYPES.get(inputs[0].type)
    if kind is None:
        raise TypeError(f"the file takes {inputs[0].type}; one of {', '.join(_ONNX_TYPES)} is needed")

    def ask(images: Array) -> Any:
        return session.run([named], {inputs[0].name: images})[0]

    return in_the_form(ask, kind, shape[0] if shape else None), {
        "input_shape": shape,
        "whole_numbers": kind is np.uint8,
    }


def _module(module: Any, output: str | None, kind: torch.dtype, batch: int | None = None) -> Ask:
    """Return a function that queries a module.

    Args:
        module: The module.
        output: Name or index of its output if it returns several.
        kind: Type of its input.
        batch: Fixed batch size; None for any.
    """
    whole = not kind.is_floating_point

    def ask(images: Array) -> Any:
        given = _one(module(torch.from_numpy(images).to(kind)), output)
        return given.detach().float().numpy() if given.is_floating_point() else given.numpy()

    return in_the_form(ask, np.uint8 if whole else np.float32, batch)


def _one(given: Any, output: str | None) -> torch.Tensor:
    """Return the named one of several outputs."""
    several: dict[str, Any] = {}
    if isinstance(given, Mapping):
        several = {str(name): value for name, value in given.items()}
    elif isinstance(given, Sequence):
        several = {str(place): value for place, value in enumerate(given)}
    if len(several) == 1 and output is None:
        given = next(iter(several.values()))
    elif several:
        if output not in several:
            raise TypeError(f"the model returns {len(several)} outputs; name one with --output: {list(several)}")
        given = several[output]
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"the model returns a {type(given).__name__}, not a tensor")
    return given


def in_the_form(ask: Callable[[Array], Any], kind: type[np.generic], batch: int | None) -> Ask:
    """Adapt the query function of a model with fixed input type and batch size to any number of float32 images.

    Args:
        ask: Queries the model itself.
        kind: Type of its input. For integers, values are rounded and clipped to the type's range.
        batch: Fixed batch size, filled up by repeating the last image; None for any.
    """

    def asking(images: npt.NDArray[np.float32]) -> Any:
        if issubclass(kind, np.integer):
            images = np.rint(images).clip(np.iinfo(kind).min, np.iinfo(kind).max)
        given = np.ascontiguousarray(images.astype(kind))
        if batch is None or len(given) == batch:
            return ask(given)
        parts = []
        for start in range(0, len(given), batch):
            part = given[start : start + batch]
            filled = part if len(part) == batch else np.concatenate([part, part[-1:].repeat(batch - len(part), 0)])
            answers = np.asarray(ask(filled))
            if answers.ndim < 1 or len(answers) != batch:
                raise ValueError(
                    f"the model returned {answers.shape} for {batch} images; it must give one row for each"
                )
            parts.append(answers[: len(part)])
        return np.concatenate(parts)

    return asking


def _torch_export(path: Path, job: dict[str, Any]) -> Opened:
    program = torch.export.load(path)
    names = program.graph_signature.user_inputs
    if len(names) != 1:
        raise TypeError(f"the file has {len(names)} inputs, not one: {list(names)}")
    (taken,) = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names)
    shape = [side if isinstance(side, int) else None for side in taken.shape]
    ask = _module(program.module(), job.get("output"), taken.dtype, shape[0] if shape else None)
    return ask, {"input_shape": shape, "whole_numbers": not taken.dtype.is_floating_point}


def _torchscript(path: Path, job: dict[str, Any]) -> Opened:
    load: Any = torch.jit.load  # its type annotations depend on the version of torch
    module = load(str(path), map_location="cpu").eval()
    kinds = [each.dtype for each in module.parameters() if each.is_floating_point()]
    return _module(module, job.get("output"), kinds[0] if kinds else torch.float32), {}


def _state(path: Path, job: dict[str, Any]) -> Opened:
    """Load a state dict into the job's architecture, with mea_ray's own input format."""
    from mea_ray.models.build import build_model
    from mea_ray.models.weights import load_weights, read_state

    spec = job["architecture"]
    model = build_model(spec["name"], spec["shape"], spec["classes"], spec["params"])
    load_weights(model, read_state(path), path)
    return _module(model.eval(), None, torch.float32), {}


LOADERS: dict[str, Callable[[Path, dict[str, Any]], Opened]] = {
    "onnx": _onnx,
    "torch.export": _torch_export,
    "torchscript": _torchscript,
    "weights": _state,
}
