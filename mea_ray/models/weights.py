"""Weights that were trained elsewhere: read without running code, and put into a network by name and shape."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mea_ray.core.errors import ArtifactError, ConfigError, first_line
from mea_ray.core.regular import check_regular
from mea_ray.models.base import ImageModel
from mea_ray.models.foreign import ForeignModel

State = dict[str, Tensor]

CONTAINERS = ("state_dict", "net_state_dict", "model_state_dict", "model", "net", "ema_state_dict")
"""Keys under which training scripts put the weights beside optimiser and epoch."""
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""Put before every name by wrappers (DataParallel, torch.compile) and by modules that hold the network."""
AUTHORS = {
    **{f"m1.{layer}": f"convolutions.{layer}" for layer in (0, 2, 5, 7)},
    "m2.1": "hidden.2",
    "m2.3": "hidden.4",
    "m2.5": "head",
}
"""Layers of the MEA-Defender authors' ``model/cw.py``, to those of ``vgg_like``."""
AUTHORS_MEAN, AUTHORS_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""What the authors' scripts normalise CIFAR-10 with, outside of the network."""


def read_state(path: str | Path) -> State:
    """Read a state dict: safetensors, or a file of ``torch.save``, of which nothing but tensors is read.

    Args:
        path: The file. A checkpoint that holds the state dict under a usual key (``state_dict``, ``net_state_dict``,
            ...) is opened; prefixes that wrappers put before every name are taken off.

    Raises:
        ArtifactError: It is neither, is damaged, holds anything but tensors, or would have to run code.
    """
    path = Path(path)
    try:
        path = path.expanduser()
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(16)
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors" or start[8:9] == b"{"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to read it without this safety
            reason = "it is neither safetensors nor a file of torch.save with nothing but tensors in it"
        raise ArtifactError(
            f"{path} holds no weights that can be read safely: {reason}; save them with "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    return _without_prefix(_opened(content, path))


def _opened(content: Any, path: Path) -> State:
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(name): value.detach() for name, value in content.items()}
    listed = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
    raise ArtifactError(
        f"{path} holds no state dict of tensors, nor one under {', '.join(CONTAINERS)}; it holds: {listed or 'nothing'}"
    )


def _without_prefix(state: State) -> State:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _without_prefix({name.removeprefix(prefix): value for name, value in state.items()})
    return state


def load_weights(model: ImageModel, state: State, path: str | Path) -> None:
    """Put weights into a network, in place.

    A network of mea_ray keeps its normalisation if the file has none. A checkpoint of the MEA-Defender authors' network
    is put into ``vgg_like`` under our names, with the normalisation of their scripts.

    Args:
        model: The network; of a module from outside the file holds the module's own weights.
        state: From ``read_state``.
        path: Where they come from, for the message.

    Raises:
        ConfigError: Names or shapes do not fit the network.
    """
    target: nn.Module = model.net if isinstance(model, ForeignModel) else model
    if _is_authors(state) and not isinstance(model, ForeignModel):
        state = {_authors_name(name): value for name, value in state.items()}
        if model.shape[0] == len(AUTHORS_MEAN):
            model.set_normalisation(AUTHORS_MEAN, AUTHORS_DEVIATION)
    own = target.state_dict()
    statistics = (
        {} if isinstance(model, ForeignModel) else {name: own[name] for name in ("mean", "std") if name not in state}
    )
    state = {**statistics, **state}
    wrong = [
        *(f"{name} is missing" for name in own if name not in state),
        *(f"{name} is not the network's" for name in state if name not in own),
        *(
            f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ConfigError(
            f"weights {path} do not fit {type(model).__name__}: {'; '.join(wrong[:4])}{more}; name the network and the "
            "options that they were trained with"
        )
    if not all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point()):
        raise ConfigError(f"weights {path} hold numbers that are not finite; the model cannot be used")
    target.load_state_dict(state)


def _is_authors(state: State) -> bool:
    return {name.rpartition(".")[0] for name in state} == {*AUTHORS}


def _authors_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{AUTHORS[layer]}.{kind}"
