"""Extraction by distillation: a substitute is trained on the victim's answers (Hinton et al., 2015)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mea_ray.attacks.base import Rung
from mea_ray.attacks.learning import Learning
from mea_ray.attacks.queries import CachedQueries
from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief, agreement, held_out_images, refuse_unlean
from mea_ray.attacks.transfer import Indices, TransferSet
from mea_ray.config import LearningConfig, TrainingConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import BlackBox
from mea_ray.training.engine import train
from mea_ray.training.objective import Batch, Objective


class Distillation(QueryAttack):
    """Train substitutes on the victim's answers to the thief's own images.

    Choose it first: the thief has images like the victim's.

    Each image is queried once, unaugmented. Its augmented views are trained towards the same answer, so a budget of n
    is n images charged. The images of a rung are the first n of one random order of the pool, the same for all rungs. A
    substitute depends on its own prefix only, never on the rungs before it. The loss is set in ``thief.learning``; its
    temperature is 7 unless chosen, as in MEA-Defender's code.

    Args:
        requery: Query the victim with every augmented batch of every epoch, as MEA-Defender's code does. Each budget
            then pays for a whole training: budget / epochs images are queried once per epoch. The budgets share no
            answers, so their sum is charged.
        query_chunk: Images in a query; the answers of one are on the disk before the next is sent.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531.
        Lv et al., MEA-Defender, 2024, https://arxiv.org/abs/2401.15239; its `model_distillation.py`.
    """

    default_temperature = 7.0

    def __init__(self, *, requery: bool = False, query_chunk: Annotated[int, Field(ge=1)] = 1024) -> None:
        self.requery = requery
        self.query_chunk = query_chunk

    def query_cost(self, budgets: Sequence[int]) -> int:
        """Return the largest budget; with `requery` the sum of all, because its rungs share no answer."""
        return sum(budgets) if self.requery else max(budgets)

    def answered_images(self, transfer: TransferSet, budgets: Sequence[int]) -> int:
        """Return the number of stored answers; with `requery` over the transfer sets of all rungs."""
        return sum(len(self._own(transfer, b)) for b in budgets) if self.requery else len(transfer)

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return the largest budget; with `requery` 1, because images are queried again and again."""
        return 1 if self.requery else max(budgets)

    def smallest_batch(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: TrainingConfig,
        learning: LearningConfig = LearningConfig(),
    ) -> int:
        """Return the fewest images that a network is trained on at once; see ``Attack.smallest_batch``."""
        smallest = super().smallest_batch(pool_size, budgets, training, learning)
        if not self.requery:
            return smallest
        return min(smallest, self._sizes(budgets[0], pool_size, training, self.learning(learning))[0])

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: TrainingConfig,
        learning: LearningConfig = LearningConfig(),
        *,
        labelled: bool = True,
    ) -> None:
        """Refuse what ``run`` could not finish; see ``Attack.check``."""
        super().check(pool_size, budgets, training, learning, labelled=labelled)
        if not self.requery:
            return
        refuse_unlean(self.learning(learning), "with requery=true answers are learned from as they come")
        for budget in budgets:
            trained_on, held_out = self._sizes(budget, pool_size, training, self.learning(learning))
            if trained_on < 1 or (held_out < 1 and training.early_stop_patience is not None):
                raise ConfigError(
                    f"a budget of {budget} leaves {trained_on} images to train on and {held_out} to validate with; "
                    "raise thief.budgets, or change thief.learning.validation_fraction or thief.training.epochs"
                )

    def queries(self, thief: Thief) -> Queries:
        """Query the pool in a random order."""
        return thief.query_pool(self.query_chunk)

    def rungs(self, thief: Thief, blackbox: BlackBox, budgets: Sequence[int], wanted: Sequence[int]) -> Iterator[Rung]:
        """See the base class; with `requery` no two rungs share an answer, so each has a transfer set of its own."""
        if not self.requery:
            return super().rungs(thief, blackbox, budgets, wanted)
        return self._requeried_rungs(thief, blackbox, wanted)

    def trains_apart(self) -> bool:
        """See the base class; with `requery` a training queries in every step."""
        return not self.requery

    def _requeried_rungs(self, thief: Thief, blackbox: BlackBox, wanted: Sequence[int]) -> Iterator[Rung]:
        for budget in wanted:
            yield self._requeried(thief, blackbox, budget, self._own(thief.transfer, budget))
        thief.forget_snapshots()

    @staticmethod
    def _own(transfer: TransferSet, budget: int) -> TransferSet:
        return TransferSet(transfer.path / f"requery-{budget}" if transfer.path is not None else None)

    @staticmethod
    def _sizes(budget: int, pool_size: int, training: TrainingConfig, learning: Learning) -> tuple[int, int]:
        """Return how many images a rung trains on and how many it holds out, at a cost within the budget."""
        fraction = learning.validation_fraction if training.early_stop_patience is not None else 0.0
        epochs = training.epochs
        # Held-out images are queried once, training images once per epoch.
        count = min(pool_size, int(budget / (fraction + (1 - fraction) * epochs)))
        while count and round(fraction * count) + (count - round(fraction * count)) * epochs > budget:
            count -= 1
        held_out = held_out_images(count, training, learning)
        return count - held_out, held_out

    def _requeried(self, thief: Thief, blackbox: BlackBox, budget: int, transfer: TransferSet) -> Rung:
        pool = thief.pool
        order = thief.random_order()
        count, held_out = self._sizes(budget, len(pool), thief.training, thief.learning)
        images, unseen = order[:count], order[count : count + held_out]
        cached = CachedQueries(blackbox, transfer, self.query_chunk)
        validate = None
        if held_out:
            labels = cached.query(unseen, pool[unseen]).argmax(1)
            validate = partial(agreement, images=pool[unseen], labels=labels)
        objective = RequeryObjective(thief.learning, cached, images)
        model = thief.new_model("substitute", budget)
        seed = derive(thief.seed, "training", budget)
        snapshots = thief.snapshots("training", budget)
        settings = thief.training
        try:
            report = train(
                model, pool[images], None, objective, settings, seed=seed, validate=validate, snapshots=snapshots
            )
        finally:
            cached.flush()
        return Rung(budget, cached.queries_spent, model, report.epochs, report.seconds)


class RequeryObjective(Objective):
    """Distillation from the victim's own answer to each augmented batch.

    Args:
        learning: The loss.
        cached: Asks the victim, or the answers of an earlier process.
        positions: Of the training images in the pool, int64 (N,).
    """

    resumable = True

    def __init__(self, learning: Learning, cached: CachedQueries, positions: Indices) -> None:
        super().__init__()
        self.learning, self.cached, self.positions = learning, cached, positions

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Query the victim, and return ``{"distillation": loss}``."""
        views = batch.images.detach().float().cpu().contiguous().numpy()
        asked = self.cached.query(self.positions[batch.indices.cpu().numpy()], views)
        answers = torch.from_numpy(asked).to(self.context.device)
        targets = self.learning.soften(answers)
        images, targets = self.learning.mix(batch.images, targets, self.context.generator)
        return {"distillation": self.learning.distance(model(images), targets)}

    def memory(self) -> dict[str, Any]:
        """Return the number of answers so far, all of which are on the disk then."""
        self.cached.flush()
        return {"answered": self.cached.queries_spent}

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class.

        Raises:
            ArtifactError: Answers that the training has learnt from are not there any more.
        """
        self.cached.skip(memory["answered"])
