"""Turns objects in memory (classes, datasets, mappings) into a checked experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import nn

from mea_ray.config import ExperimentConfig, build, load_experiment
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.arrays import save_arrays
from mea_ray.storage.files import at_home

Component = str | Mapping[str, Any]
"""The name of a component, or a mapping with ``name`` and its options."""


@runtime_checkable
class Labelled(Protocol):
    """A dataset in torchvision's style: ``dataset[i]`` is an image and its label."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return an image (a PIL image, or an array or tensor (C, H, W)) and the index of its class."""
        ...


def experiment(config: ExperimentConfig | str | Path | Mapping[str, Any] | None) -> ExperimentConfig:
    """Return an experiment.

    Args:
        config: An experiment, a YAML file, a mapping of what differs from the defaults, or None for the defaults.

    Raises:
        ConfigError: It cannot be read, or a setting is wrong.
    """
    if isinstance(config, ExperimentConfig):
        return config
    if isinstance(config, Mapping):
        return build(ExperimentConfig, config)
    return load_experiment(config)


def network(model: str | Mapping[str, Any] | type[nn.Module]) -> Component:
    """Return a network as named in a config, it.

    Raises:
        ConfigError: A class is not at the top of a module that can be imported.
    """
    if not isinstance(model, type):
        return model
    if "." in model.__qualname__:
        raise ConfigError(
            f"{model.__qualname__} is defined inside of {model.__qualname__.rpartition('.')[0]}; move it to the top of "
            "a module, so that it can be imported again when the victim is loaded"
        )
    return f"{model.__module__}:{model.__qualname__}"


def dataset(
    data: Component | Dataset | tuple[Labelled, Labelled], storage: str | Path, class_names: Sequence[str] | None
) -> Component:
    """Return data as named in a config, them; objects in memory are written to the storage first.

    Args:
        data: A component, a ``Dataset``, or a training and a test set in torchvision's style.
        storage: A local folder.
        class_names: Names of the classes of torchvision-style sets; their ``classes`` when None.

    Raises:
        DataError: The images differ in size, or the labels are not class indices.
    """
    if isinstance(data, (str, Mapping)):
        return data
    if isinstance(data, tuple):
        train, test = data
        names = class_names if class_names is not None else getattr(train, "classes", None)
        data = Dataset("arrays", _in_memory(train, names), _in_memory(test, names))
    path = at_home(storage, "storage").absolute() / "datasets" / f"{data.fingerprint}.npz"
    if not path.exists():
        save_arrays(path, data)
    return {"name": "arrays", "path": str(path)}


def _in_memory(part: Labelled, class_names: Sequence[str] | None) -> ImageSet:
    images, labels = [], []
    for index in range(len(part)):
        image, label = part[index]
        images.append(_pixels(image))
        labels.append(int(label))
    if len({image.shape for image in images}) != 1:
        sizes = sorted({image.shape for image in images})[:4]
        raise DataError(f"the images have several shapes, among them {sizes}; resize them in the dataset's transform")
    names = tuple(map(str, class_names)) if class_names is not None else tuple(map(str, range(max(labels) + 1)))
    return ImageSet(np.stack(images), np.array(labels, np.int64), names)


def _pixels(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return uint8 (C, H, W) of a PIL image (H, W[, C]), or of a tensor or array (C, H, W) in [0, 1] or 0..255."""
    is_picture = not hasattr(image, "dtype")
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[None]
    elif is_picture and array.ndim == 3:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3:
        raise DataError(
            f"an image has shape {array.shape}; it must be a PIL image, or an array (channels, height, width)"
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) or array.min() < 0 or array.max() > 1:
        raise DataError(
            f"an image holds {array.dtype} values from {array.min():.3g} to {array.max():.3g}; give uint8, or floats "
            "in [0, 1] (leave a Normalize out of the dataset's transform: the network normalises)"
        )
    return (255 * array + 0.5).astype(np.uint8)
