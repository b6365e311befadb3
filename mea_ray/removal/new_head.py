"""A new last layer, pushed away from the old one: shared by WRK and Feature Shift Tuning."""

from __future__ import annotations

from torch import Tensor, nn

from mea_ray.core.seeding import derive
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import last_layer
from mea_ray.training.device import seeded
from mea_ray.training.objective import Batch, CrossEntropy, StepContext


def draw_head(model: ImageModel, seed: int) -> Tensor:
    """Draw the last layer of ``model`` anew, in place; return the old weights, float32 (classes, features)."""
    head = last_layer(model)
    old = head.weight.detach().clone()
    with seeded(derive(seed, "head")):
        head.reset_parameters()  # uniform within 1 / sqrt(inputs), as both published codes draw it
    return old


class AwayFromOldHead(CrossEntropy):
    """Cross-entropy, plus alpha times the inner product of the last layer's weights with the old ones.

    Args:
        old: The old weights, float32 (classes, features).
        alpha: Weight of the inner product.
    """

    def __init__(self, old: Tensor, alpha: float) -> None:
        super().__init__()
        self.old, self.alpha = old, alpha

    def start(self, context: StepContext) -> None:
        """Move the old weights to the device."""
        super().start(context)
        self.old = self.old.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"utility": cross-entropy, "away": alpha * sum(W * W_old)}``."""
        terms = super().terms(model, batch)
        if self.alpha:
            terms["away"] = self.alpha * (linear_head(model).weight.float() * self.old).sum()
        return terms


def linear_head(model: nn.Module) -> nn.Linear:
    """Return the head of a model for which ``last_layer`` was checked before."""
    head = model.head
    assert isinstance(head, nn.Linear)
    return head
