"""Learning-rate schedules as plain functions of the update, and the optimisers they drive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from mea_ray.config.training import TrainingConfig
from mea_ray.training.device import fused_optimizers

# torch's OneCycleLR starts at 1/25 of the peak and ends at 1/10,000 of the start.
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = ONE_CYCLE_START / 1e4


def _between(start: float, end: float, part: float) -> float:
    """Cosine from ``start`` (part 0) to ``end`` (part 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


def factor(training: TrainingConfig, update: int, updates: int, epoch: int) -> float:
    """Return the factor on the peak learning rate for one update.

    The values are those of torch's StepLR, CosineAnnealingLR (stepped per update) and OneCycleLR. Unlike OneCycleLR, a
    cycle with fewer than two warm-up updates starts at its peak.

    Args:
        training: Its ``schedule``, ``step_epochs``, ``step_factor`` and ``warmup_fraction`` are used.
        update: Updates done so far, from 0.
        updates: Updates of the whole training.
        epoch: Epochs done so far, from 0.
    """
    if training.schedule == "constant":
        return 1.0
    if training.schedule == "step":
        return training.step_factor ** (epoch // training.step_epochs)
    if training.schedule == "cosine":
        return _between(1.0, 0.0, update / updates)
    peak = training.warmup_fraction * updates - 1
    if peak < 1:
        peak = 0.0
    if update <= peak:
        return _between(ONE_CYCLE_START, 1.0, update / peak) if peak else 1.0
    return _between(1.0, ONE_CYCLE_END, (update - peak) / (updates - 1 - peak))


def make_optimizer(
    model: nn.Module,
    device: torch.device,
    training: TrainingConfig,
    heads: Sequence[nn.Parameter] = (),
    *,
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimiser of a model's trainable parameters, fused into one kernel per update where torch has one.

    ``heads`` are parameters of the objective that are trained with the model's. With ``scaled`` gradients SGD is not
    fused: torch 2.14 makes its momentum of memory without values if the very first update overflows.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad] + list(heads)
    fused = fused_optimizers(device) and not (scaled and training.optimizer == "sgd")
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=fused)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=training.momentum, fused=fused)
