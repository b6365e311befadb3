"""The arithmetic of a training step: which type autocast computes in, TF32, and the scale of float16 losses."""

from __future__ import annotations

import torch

from mea_ray.config.training import Precision
from mea_ray.training import device as devices
from mea_ray.training.objective import Objective

GROWTH_INTERVAL = 2000
"""Updates without an overflow after which the scale of float16 losses is doubled, as torch has it."""


def autocast_dtype(precision: Precision, where: torch.device) -> torch.dtype | None:
    """Return what autocast computes in on a device for a precision setting; None for float32 without autocast."""
    if precision == "auto":
        if devices.native_bfloat16(where):
            return torch.bfloat16
        return torch.float16 if devices.fast_float16(where) else None
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def step_dtype(precision: Precision, where: torch.device, objective: Objective) -> torch.dtype | None:
    """Return ``autocast_dtype``, but float32 in place of float16 for losses that cannot be scaled.

    Small gradients are zero in float16, so that the losses are multiplied by a scale and the gradients divided by it.
    An objective that computes more than the gradient of a sum of its losses would see the scale.
    """
    dtype = autocast_dtype(precision, where)
    return None if dtype is torch.float16 and not objective.sums_terms else dtype


def loss_scale(where: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Return torch's scaler of losses and gradients; it does nothing unless the type is float16.

    An update whose gradients overflow is left out, and the scale is halved.
    """
    return torch.amp.GradScaler(where.type, growth_interval=GROWTH_INTERVAL, enabled=dtype is torch.float16)
