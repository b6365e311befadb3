"""Copies of a network for deployment: ONNX and ``torch.export``. Both take any number of images and return logits."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mea_ray.core.errors import ArtifactError, first_line
from mea_ray.core.seeding import numpy_generator
from mea_ray.models.base import ImageModel

ONNX, TORCH_EXPORT = "model.onnx", "model.pt2"
NEEDED = ("onnx", "onnxscript")
"""Packages needed for an ONNX copy: the extra ``onnx``."""
TOLERANCE = 1e-3
"""Maximum difference of a logit between a network and its copy, relative to the largest logit."""


def onnx_installed() -> bool:
    """Return whether ONNX copies can be written."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDED)


def write_copies(folder: Path, model: ImageModel) -> list[str]:
    """Write ``model.pt2``, and ``model.onnx`` if the extra ``onnx`` is installed.

    Input ``images``: float32 (N, C, H, W) in [0, 1], any N. Output ``logits``: float32 (N, classes).

    Args:
        folder: An existing folder.
        model: The network, on the CPU.

    Returns:
        Names of the files that were written.

    Raises:
        ArtifactError: The network cannot be exported, or the logits of a copy differ from the network's.
    """
    network = deepcopy(model).to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()
    writers: dict[str, Callable[[Path, ImageModel], None]] = {TORCH_EXPORT: _write_torch_export}
    if onnx_installed():
        writers[ONNX] = _write_onnx
    for name, write in writers.items():
        try:
            with _quiet():
                write(folder / name, network)
        except ArtifactError:
            raise
        except Exception as error:  # torch raises errors of a dozen private types here
            raise ArtifactError(
                f"{type(model).__name__} cannot be exported to {name}: {type(error).__name__}: {first_line(error)}; "
                "save the victim without copies (--no-copies), or rewrite what torch.export cannot follow"
            ) from error
    return list(writers)


def _example(model: ImageModel, count: int) -> torch.Tensor:
    drawn = numpy_generator(0, "export").random((count, *model.shape), dtype=np.float32)
    return torch.from_numpy(drawn)


def _write_torch_export(path: Path, model: ImageModel) -> None:
    shapes = ({0: torch.export.Dim("N")},)
    program = torch.export.export(model, (_example(model, 2),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    copy = program.module()
    _compare(path, model, lambda images: copy(images).detach().numpy())


def _write_onnx(path: Path, model: ImageModel) -> None:
    torch.onnx.export(
        model,
        (_example(model, 2),),
        path,
        dynamo=True,
        external_data=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    _compare(path, model, lambda images: session.run(None, {"images": images.numpy()})[0])


def _compare(path: Path, model: ImageModel, run: Callable[[torch.Tensor], npt.NDArray[np.float32]]) -> None:
    """Compare network and copy on three images, another batch size than the copy was traced with."""
    images = _example(model, 3)
    with torch.no_grad():
        expected = model(images).numpy()
        given = run(images)
    error = float(np.abs(given - expected).max())
    if error > TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ArtifactError(f"{path.name} gives logits that differ by up to {error:.3g} from the network's")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which report each of their steps."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
