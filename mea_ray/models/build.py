"""Build a network by name. The network keeps its arguments, so that a checkpoint can rebuild it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mea_ray.core.settings import Settings
from mea_ray.models import MODELS
from mea_ray.models.base import ImageModel
from mea_ray.models.foreign import ForeignModel, takes_channels_last


def build_model(name: str, shape: Sequence[int], classes: int, params: Mapping[str, Any] | None = None) -> ImageModel:
    """Build a network with fresh weights from torch's global generator.

    Args:
        name: Name in the table of models.
        shape: (channels, height, width) of one image.
        classes: Number of classes.
        params: Keyword arguments of the network; missing ones take their defaults.

    Returns:
        The network. ``spec`` holds ``name``, ``params`` (all of them), ``shape`` and ``classes`` as plain JSON types;
        ``build_model(**model.spec)`` builds the same architecture.

    Raises:
        ConfigError: Unknown name or parameter, a value of the wrong type or out of its range, or an image too small
            for the network.
    """
    checked = MODELS.check(name, params or {})
    channels, height, width = (int(value) for value in shape)
    model: ImageModel = MODELS.resolve(name)((channels, height, width), int(classes), **checked)
    if name not in MODELS.entries and not isinstance(model, ForeignModel):
        model.channels_last = takes_channels_last(model)
    plain = {key: _plain(value) for key, value in checked.items()}
    model.spec = {"name": name, "params": plain, "shape": list(model.shape), "classes": model.classes}
    return model


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.resolved()
    return list(value) if isinstance(value, tuple) else value
