"""What an experiment with encoders needs besides: how they are read as classifiers, so that all else stays the same."""

from __future__ import annotations

from copy import deepcopy

import torch

from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import probes
from mea_ray.experiment.checks import Prepared
from mea_ray.models.base import ImageModel


def labelled(config: ExperimentConfig, prepared: Prepared) -> ImageSet:
    """Return the labelled images that encoders are read with: a part of the victim's, the same for all models."""
    owned = prepared.splits.victim_train
    count = min(config.verification.probe_images, len(owned))
    return owned.take(numpy_generator(derive(config.victim.seed, "probe"), "images").permutation(len(owned))[:count])


def as_classifier(config: ExperimentConfig, prepared: Prepared, model: torch.nn.Module) -> torch.nn.Module:
    """Return a classifier as it is, and an encoder read as this experiment reads it.

    Whatever head an encoder came with: a stored victim's was fitted by the experiment that trained it, which may have
    read it otherwise.
    """
    return read(config, prepared, model) if config.encodes else model


def read(config: ExperimentConfig, prepared: Prepared, model: torch.nn.Module) -> ImageModel:
    """Return a copy of an encoder whose head reads its features as classes (``verification.reading``)."""
    if not isinstance(model, ImageModel):
        raise ConfigError(f"{type(model).__name__} is no network of mea_ray.models, so its features cannot be read")
    copied = deepcopy(model)
    probes.read(copied, labelled(config, prepared), config.verification.reading)
    return copied
