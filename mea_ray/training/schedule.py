"""Learning-rate schedules as plain functions of the update, and the optimisers they drive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from mea_ray.core.errors import ConfigError
from mea_ray.training.device import fused_optimizers

SCHEDULES = ("constant", "step", "cosine", "one_cycle")
OPTIMIZERS = ("adam", "adamw", "sgd")
# torch's OneCycleLR: the first learning rate is the peak's 25th part, the last one the first's 10,000th.
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = ONE_CYCLE_START / 1e4


def _between(start: float, end: float, part: float) -> float:
    """Cosine from ``start`` (part 0) to ``end`` (part 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


def factor(
    schedule: str,
    update: int,
    updates: int,
    epoch: int,
    step_epochs: int = 10,
    step_factor: float = 0.5,
    warmup_fraction: float = 0.2,
) -> float:
    """Return the factor on the peak learning rate for one update.

    The values are those of torch's StepLR, CosineAnnealingLR (stepped per update) and OneCycleLR. Unlike OneCycleLR, a
    cycle with fewer than two warm-up updates starts at its peak.

    Args:
        schedule: One of ``SCHEDULES``.
        update: Updates done so far, from 0.
        updates: Updates of the whole training.
        epoch: Epochs done so far, from 0.
        step_epochs: ``step``: epochs between two cuts.
        step_factor: ``step``: factor of each cut.
        warmup_fraction: ``one_cycle``: part of the updates spent rising.

    Raises:
        ConfigError: The schedule is unknown.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return step_factor ** (epoch // step_epochs)
    if schedule == "cosine":
        return _between(1.0, 0.0, update / updates)
    if schedule != "one_cycle":
        raise ConfigError(f"unknown schedule {schedule!r}; use one of {', '.join(SCHEDULES)}")
    peak = warmup_fraction * updates - 1
    if peak < 1:
        peak = 0.0
    if update <= peak:
        return _between(ONE_CYCLE_START, 1.0, update / peak) if peak else 1.0
    return _between(1.0, ONE_CYCLE_END, (update - peak) / (updates - 1 - peak))


def make_optimizer(
    model: nn.Module,
    device: torch.device,
    *,
    optimizer: str,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    heads: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Build the optimiser of a model's trainable parameters, fused into one kernel per update where torch has one.

    ``heads`` are parameters of the objective that are trained with the model's.

    Raises:
        ConfigError: The optimiser is unknown.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad] + list(heads)
    fused = fused_optimizers(device)
    if optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    if optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay, momentum=momentum, fused=fused)
    raise ConfigError(f"unknown optimizer {optimizer!r}; use one of {', '.join(OPTIMIZERS)}")
