"""Opens a suspect (a file, a folder, a URL, ``pkg:function``) as a function that can be queried."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mea_ray.config import ModelChoice, yaml_text
from mea_ray.core import plugins
from mea_ray.core.errors import ArtifactError, ConfigError, SuspectError
from mea_ray.experiment.suspect.network import Ask
from mea_ray.experiment.suspect.process import Limits, SuspectProcess
from mea_ray.storage.files import read_at_most, refusing, sha256
from mea_ray.training.checkpoint import DESCRIPTION, WEIGHTS, load_model

SourceKind = Literal["onnx", "torch.export", "torchscript", "weights", "model folder", "url", "function"]


@dataclass(frozen=True)
class Source:
    """The source of a suspect.

    Attributes:
        text: The user's text.
        kind: What it is.
        sha256: Of the file, or of a folder's weights; empty for what has no file.
        network: How its process was isolated from the network (``namespace`` or ``python``); empty without a process.
        input_shape: Input shape that its file declares, including the batch; None if it declares none.
        whole_numbers: Whether its file declares an integer input.
    """

    text: str
    kind: SourceKind
    sha256: str = ""
    network: str = ""
    input_shape: list[int | None] | None = None
    whole_numbers: bool = False


@dataclass(frozen=True)
class HowToOpen:
    """The user's settings for opening a suspect.

    Attributes:
        architecture: Network for a file of weights.
        shape: (channels, height, width) of the images, for that network.
        classes: Number of the suspect's classes, for that network.
        output: Name of the output of a file that has several; the first of an ONNX file when None.
        limits: Resource limits of a file's process.
        open_url: Opens a URL.
    """

    architecture: ModelChoice
    shape: tuple[int, int, int]
    classes: int
    output: str | None = None
    limits: Limits = field(default_factory=Limits)
    open_url: Callable[[str], Ask] | None = None


def kind_of_source(text: str) -> SourceKind:
    """Return what a suspect is, from its name and the first bytes of its file.

    Raises:
        ConfigError: It cannot be queried.
    """
    if text.startswith(("http://", "https://")):
        return "url"
    path = Path(text)
    if path.is_dir():
        if (path / WEIGHTS).is_file() and (path / DESCRIPTION).is_file():
            return "model folder"
        raise ConfigError(f"{text} is a folder without {WEIGHTS} and {DESCRIPTION}; name a file of a model in it")
    if path.is_file():
        return _kind_of_file(path)
    if plugins.is_path(text):
        return "function"
    raise ConfigError(
        f"suspect {text!r} is not a file, a folder, a URL or package.module:function; give an ONNX, torch.export, "
        "TorchScript or safetensors file, a state dict, a URL, or a function of images"
    )


def _kind_of_file(path: Path) -> SourceKind:
    if path.suffix.lower() == ".onnx":
        return "onnx"
    if not zipfile.is_zipfile(path):
        return "weights"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()[:10_000]]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is a damaged zip file: {error}; download it again") from error
    if path.suffix == ".pt2" or "archive_format" in names or any(name.startswith("models/") for name in names):
        return "torch.export"
    return "torchscript" if "constants.pkl" in names or any(name.startswith("code/") for name in names) else "weights"


def _fingerprint(path: Path) -> str:
    with refusing(f"the suspect {path} cannot be read", "give a file or a folder of a model"):
        return sha256(path)


@contextmanager
def opened(text: str, how: HowToOpen) -> Iterator[tuple[Ask, Source]]:
    """Open a suspect; a file runs in its own process, which ends with the ``with`` block.

    Raises:
        ConfigError: The name does not refer to anything that can be queried.
        SuspectError: It cannot be loaded.
        ArtifactError: It is damaged.
    """
    kind = kind_of_source(text)
    if kind == "url":
        if how.open_url is None:
            raise ConfigError(f"{text}: URLs are not supported here")
        yield how.open_url(text), Source(text, kind)
    elif kind == "function":
        yield _function(text), Source(text, kind)
    elif kind == "model folder":
        yield _folder(Path(text)), Source(text, kind, _fingerprint(Path(text) / WEIGHTS))
    else:
        fingerprint = _fingerprint(Path(text))
        spec = {"shape": list(how.shape), "classes": how.classes, **_spec(how.architecture)}
        with SuspectProcess(kind, Path(text), how.limits, architecture=spec, output=how.output) as process:
            about = process.about
            shape = about.get("input_shape")
            expected = _shape(shape) if shape is not None else None
            whole = about.get("whole_numbers") is True
            yield process.ask, Source(text, kind, fingerprint, str(about.get("network", "")), expected, whole)


def _shape(given: Any) -> list[int | None]:
    if not isinstance(given, list) or not all(each is None or isinstance(each, int) for each in given):
        raise SuspectError(f"the suspect's process declares an input of shape {given!r}")
    return given


def _spec(choice: ModelChoice) -> dict[str, Any]:
    tree = choice.resolved()
    return {"name": tree.pop("name"), "params": tree}


def _folder(folder: Path) -> Ask:
    """Load a folder that mea_ray wrote: safetensors and JSON. A network from outside mea_ray is refused.

    ``model.json`` names the network. It comes from someone else, and importing a module that it names would run code.
    """
    model, _ = load_model(folder, own_networks_only=True)

    def ask(images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.from_numpy(images))
        return logits.numpy()

    return ask


def _function(text: str) -> Ask:
    function = plugins.load(f"suspect {text!r}", text)
    if not callable(function):
        raise ConfigError(f"suspect {text!r} is not a function; it must take float32 images (N, C, H, W) in [0, 1]")

    def ask(images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        given = function(images)
        if isinstance(given, torch.Tensor):
            given = given.detach().cpu().numpy()
        given = np.asarray(given)
        if given.dtype.kind not in "fiu" or given.ndim < 1 or len(given) != len(images):
            raise SuspectError(
                f"{text} returned {given.dtype} {given.shape} for {len(images)} images; it must return one row of "
                "class scores, or one label, per image"
            )
        return given

    return ask


def class_map(text: str | None) -> tuple[Mapping[str, int] | list[str] | None, bool]:
    """Read ``--classes``: ``match``, or a YAML file with a list of names or ``NAME: COLUMN``.

    Returns:
        Names or columns, or None; and whether to match by the answers.

    Raises:
        ConfigError: The file cannot be read, or has other content.
    """
    if text is None or text == "match":
        return None, text == "match"
    try:
        written = read_at_most(Path(text), yaml_text.MAX_BYTES).decode("utf-8-sig")
        content = yaml_text.parse(written, f"--classes {text}")
    except (OSError, ValueError) as error:  # ValueError: not text, or a path with a null character
        raise ConfigError(f"--classes {text} cannot be read: {error}; give a YAML or JSON file, or match") from error
    if isinstance(content, list):
        return [str(name) for name in content], False
    if isinstance(content, dict) and all(isinstance(at, int) and not isinstance(at, bool) for at in content.values()):
        return {str(name): at for name, at in content.items()}, False
    raise ConfigError(
        f"--classes {text} must hold a list of the suspect's class names in its order, or NAME: COLUMN for each class"
    )
