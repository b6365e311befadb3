"""Extraction by distillation: a substitute learns the victim's answers (Hinton et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mea_ray.attacks.asking import Asker
from mea_ray.attacks.base import Rung
from mea_ray.attacks.driver import Queries, Thief, TransferAttack, agreement
from mea_ray.attacks.learning import Learning
from mea_ray.attacks.transfer import Indices, TransferSet
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Answers, BlackBox
from mea_ray.training.engine import train
from mea_ray.training.objective import Batch, Objective


class Distillation(TransferAttack):
    """Train substitutes on the victim's answers to the thief's own images.

    Each image is asked once, as it is; augmented views of it in training are taught the same answer, so that a budget
    of n means n images charged. The images of a rung are the first n of one random order of the pool, the same for all
    rungs; a substitute depends on its own prefix only, never on the rungs before it. The loss is set in
    ``thief.learning``; its temperature is 7 unless chosen, as the authors of MEA-Defender have it.

    Args:
        requery: Ask the victim for every augmented batch of every epoch, as the authors' code does. Each budget then
            pays for a whole training: budget / epochs images are asked once per epoch, and nothing is shared between
            budgets, so the sum of the budgets is charged.
        query_chunk: Images in a query; the answers of one are on the disk before the next is asked.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531.
        Lv et al., MEA-Defender, 2024, https://arxiv.org/abs/2401.15239; its `model_distillation.py`.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    default_temperature = 7.0

    def __init__(self, *, requery: bool = False, query_chunk: int = 1024) -> None:
        if query_chunk < 1:
            raise ConfigError(f"query_chunk={query_chunk} must be at least 1 image")
        self.requery = requery
        self.query_chunk = query_chunk

    def query_cost(self, budgets: Sequence[int]) -> int:
        """Return the largest budget; with `requery` the sum of all, whose rungs share no answer."""
        return sum(budgets) if self.requery else max(budgets)

    def answered_images(self, transfer: TransferSet, budgets: Sequence[int]) -> int:
        """Return the answers kept so far; with `requery` those of the transfer sets of the rungs."""
        return sum(len(self._own(transfer, b)) for b in budgets) if self.requery else len(transfer)

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return the largest budget; with `requery` images are asked again and again, so that any pool will do."""
        return 1 if self.requery else max(budgets)

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: Mapping[str, Any],
        learning: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse what ``run`` could not finish; see ``Attack.check``."""
        super().check(pool_size, budgets, training, learning)
        if not self.requery:
            return
        for budget in budgets:
            kept, held_out = self._sizes(budget, pool_size, training, self.learning(learning))
            if kept < 1 or (held_out < 1 and training.get("early_stop_patience") is not None):
                raise ConfigError(
                    f"a budget of {budget} leaves {kept} images to train on and {held_out} to validate with; raise "
                    "thief.budgets, or change thief.learning.validation_fraction or thief.training.epochs"
                )

    def queries(self, thief: Thief) -> Queries:
        """Ask the pool in a random order."""
        return thief.pool_in_order(self.query_chunk)

    def rungs(self, thief: Thief, blackbox: BlackBox, budgets: Sequence[int], wanted: Sequence[int]) -> Iterator[Rung]:
        """See the base; with `requery` no two rungs share an answer, so each keeps a transfer set of its own."""
        if not self.requery:
            return super().rungs(thief, blackbox, budgets, wanted)
        return (self._requeried(thief, blackbox, budget, self._own(thief.transfer, budget)) for budget in wanted)

    @staticmethod
    def _own(transfer: TransferSet, budget: int) -> TransferSet:
        return TransferSet(transfer.path / f"requery-{budget}" if transfer.path is not None else None)

    @staticmethod
    def _sizes(budget: int, pool_size: int, training: Mapping[str, Any], learning: Learning) -> tuple[int, int]:
        """Return how many images a rung trains on, and how many it holds out; what they cost is within the budget."""
        fraction = learning.validation_fraction if training.get("early_stop_patience") is not None else 0.0
        epochs = int(training.get("epochs", 20))
        # Held-out images are asked once, training images once per epoch.
        count = min(pool_size, int(budget / (fraction + (1 - fraction) * epochs)))
        while count and round(fraction * count) + (count - round(fraction * count)) * epochs > budget:
            count -= 1
        return count - round(fraction * count), round(fraction * count)

    def _requeried(self, thief: Thief, blackbox: BlackBox, budget: int, transfer: TransferSet) -> Rung:
        pool = thief.pool
        order = thief.shuffled()
        kept, held_out = self._sizes(budget, len(pool), thief.training, thief.learning)
        images, unseen = order[:kept], order[kept : kept + held_out]
        asker = Asker(blackbox, transfer, self.query_chunk)
        validate = None
        if held_out:
            said = asker.ask(unseen, pool[unseen]).argmax(1)
            validate = partial(agreement, images=pool[unseen], said=said)
        objective = Requery(thief.learning, lambda positions, views: asker.ask(images[positions], views))
        model = thief.new_model("substitute", budget)
        seed = derive(thief.seed, "training", budget)
        try:
            report = train(model, pool[images], None, objective, seed=seed, validate=validate, **thief.training)
        finally:
            asker.flush()
        return Rung(budget, asker.asked, model, report.epochs, report.seconds)


class Requery(Objective):
    """The victim's own answer to each augmented batch.

    Args:
        learning: The loss.
        ask: Positions in the training set, int64 (N,), and float32 images (N, C, H, W) in [0, 1], to answers.
    """

    def __init__(self, learning: Learning, ask: Callable[[Indices, npt.NDArray[np.float32]], Answers]) -> None:
        super().__init__()
        self.learning, self.ask = learning, ask

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Ask the victim, and return ``{"distillation": loss}``."""
        asked = batch.images.detach().float().cpu().contiguous().numpy()
        answers = torch.from_numpy(self.ask(batch.indices.cpu().numpy(), asked)).to(self.context.device)
        targets = self.learning.soften(answers)
        images, targets = self.learning.mix(batch.images, targets, self.context.generator)
        return {"distillation": self.learning.distance(model(images), targets)}
