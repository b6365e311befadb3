"""Updates of the parameters from the gradients of one batch or, with ``accumulate_steps``, of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from mea_ray.config.training import TrainingConfig
from mea_ray.training.schedule import factor

Clip: TypeAlias = Callable[[list[nn.Parameter], float], Any]
"""Scales the gradients of parameters so that their norm is at most a number."""


@dataclass
class Updates:
    """The updates of a training.

    Attributes:
        parameters: What is trained.
        optimiser: The optimiser of the parameters.
        scaler: The scale of the losses that gradients are of.
        training: The settings: learning rate and schedule, ``accumulate_steps`` and ``gradient_clip``.
        steps: Batches in an epoch.
        clip: Limits the norm of the gradients.
    """

    parameters: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    training: TrainingConfig
    steps: int
    clip: Clip

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update."""
        return float(self.optimiser.param_groups[0]["lr"])

    def due(self, step: int) -> bool:
        """Tell whether an update follows the batch ``step`` of an epoch, from 0; one always follows the last."""
        return (step + 1) % self.training.accumulate_steps == 0 or step + 1 == self.steps

    def make(self, epoch: int, step: int) -> None:
        """Update the parameters after the batch ``step`` of an epoch, both from 0, and forget their gradients."""
        for group in self.optimiser.param_groups:
            group["lr"] = self._scheduled(epoch, step)
        if self.training.gradient_clip is not None:
            self.scaler.unscale_(self.optimiser)
            self.clip(self.parameters, self.training.gradient_clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)

    def _scheduled(self, epoch: int, step: int) -> float:
        in_epoch = -(-self.steps // self.training.accumulate_steps)
        update = epoch * in_epoch + step // self.training.accumulate_steps
        return self.training.learning_rate * factor(self.training, update, self.training.epochs * in_epoch, epoch)
