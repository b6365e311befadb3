"""Encoders as classifiers: a head is fitted on their features, so that later steps treat both alike."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import numpy.typing as npt
from torch import nn

from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import ImageSet, Labels, Splits
from mea_ray.evaluation import probes
from mea_ray.models.base import ImageModel


def probe_set(config: ExperimentConfig, data: Splits) -> ImageSet:
    """Return the labelled images that heads are fitted on: a subset of the victim's, the same for all models."""
    return data.victim_train.take(_chosen(config, data))


def probe_labels(config: ExperimentConfig, data: Splits) -> Labels:
    """Return the labels of ``probe_set``, without a copy of its images."""
    return data.victim_train.labels[_chosen(config, data)]


def _chosen(config: ExperimentConfig, data: Splits) -> npt.NDArray[np.int64]:
    owned = len(data.victim_train)
    count = min(config.verification.probe_images, owned)
    return numpy_generator(derive(config.victim.seed, "probe"), "images").permutation(owned)[:count]


def with_probe(config: ExperimentConfig, labelled: ImageSet, model: nn.Module) -> ImageModel:
    """Return a copy of an encoder whose head reads its features as classes (``verification.reading``).

    Args:
        config: The experiment.
        labelled: See ``probe_set``.
        model: The encoder; its head, if any, is replaced in the copy.

    Raises:
        ConfigError: The model is not a network of ``mea_ray.models``, or its head is not linear.
    """
    if not isinstance(model, ImageModel):
        raise ConfigError(f"{type(model).__name__} is not a network of mea_ray.models, so its features cannot be read")
    copied = deepcopy(model)
    probes.read(copied, labelled, config.verification.reading)
    return copied
