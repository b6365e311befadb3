"""The training engine with its settings as keyword arguments, which is shorter in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.config import TrainingConfig, build
from mea_ray.training import engine
from mea_ray.training.engine import TrainReport
from mea_ray.training.objective import Objective
from mea_ray.training.snapshot import SnapshotFile


def train(
    model: nn.Module,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None,
    objective: Objective,
    *,
    seed: int,
    device: torch.device | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    snapshots: SnapshotFile | None = None,
    **settings: Any,
) -> TrainReport:
    """Call the engine with ``TrainingConfig(**settings)``."""
    training = build(TrainingConfig, settings)
    return engine.train(
        model,
        images,
        labels,
        objective,
        training,
        seed=seed,
        device=device,
        validate=validate,
        on_epoch=on_epoch,
        snapshots=snapshots,
    )
