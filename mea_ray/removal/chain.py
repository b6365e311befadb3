"""Removals one after the other."""

from __future__ import annotations

from typing import Any

from torch import nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Holdings, Removal


class Chain(Removal):
    """Removals one after the other, each on what the one before it left.

    Args:
        steps: Removals in their order, each as in a config: a name, or a mapping with ``name`` and parameters.

    Raises:
        ConfigError: There are no steps, or one of them cannot be built.
    """

    name = "chain"

    def __init__(self, *, steps: tuple[dict[str, Any] | str, ...] = ("fine_tuning", "pruning")) -> None:
        from mea_ray.removal import REMOVALS

        if not steps:
            raise ConfigError("a chain of removals needs steps, e.g. steps=[fine_tuning, {name: pruning, rate: 0.5}]")
        self.removals: list[Removal] = []
        for step in steps:
            parameters = {"name": step} if isinstance(step, str) else dict(step)
            if "name" not in parameters:
                raise ConfigError(f"a step of a chain needs a `name`, got {step}; known: {', '.join(REMOVALS.names())}")
            self.removals.append(REMOVALS.build(parameters.pop("name"), **parameters))

    @property
    def strength(self) -> float:
        """Number of steps."""
        return float(len(self.removals))

    def remove(self, model: ImageModel, held: Holdings, seed: int) -> nn.Module:
        """Return what is left after the last step."""
        left: nn.Module = model
        for position, removal in enumerate(self.removals):
            assert isinstance(left, ImageModel)
            left = removal.remove(left, held, derive(seed, "step", position))
        return left
