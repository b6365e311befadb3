"""Several removals in a row."""

from __future__ import annotations

from mea_ray.config.components import RemovalChoice
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Prospect, Removal, ThiefData


class Chain(Removal):
    """Several removals in a row. Each starts from the model that the one before it left.

    Choose it to try several removals in a row.

    Args:
        steps: The removals in their order, each a name, or a mapping with ``name`` and parameters.

    Raises:
        ConfigError: There are no steps, or one of them cannot be built.
    """

    name = "chain"

    def __init__(
        self,
        *,
        steps: tuple[RemovalChoice, ...] = (RemovalChoice(name="fine_tuning"), RemovalChoice(name="pruning")),
    ) -> None:
        if not steps:
            raise ConfigError("a chain of removals needs steps, e.g. steps=[fine_tuning, {name: pruning, rate: 0.5}]")
        self.removals: list[Removal] = [step.build() for step in steps]

    @property
    def strength(self) -> float:
        """Number of steps."""
        return float(len(self.removals))

    def check(self, prospect: Prospect) -> None:
        """Refuse what one of the steps refuses."""
        for removal in self.removals:
            removal.check(prospect)

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the model after the last step."""
        for position, removal in enumerate(self.removals):
            model = removal.remove(model, thief, derive(seed, "step", position))
        return model
