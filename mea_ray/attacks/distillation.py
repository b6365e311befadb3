"""Extraction by distillation: a substitute learns the victim's answers (Hinton et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray import metrics
from mea_ray.attacks.asking import Asker, fill
from mea_ray.attacks.base import Attack, MakeModel, Rung
from mea_ray.attacks.transfer import Indices, TransferSet
from mea_ray.data.statistics import channel_statistics
from mea_ray.errors import ConfigError
from mea_ray.models.base import ImageModel
from mea_ray.seeding import derive, numpy_generator
from mea_ray.training.engine import TrainReport, train
from mea_ray.training.objective import Batch, Objective, StepContext
from mea_ray.types import Answers, BlackBox, Images

Loss = Literal["kl", "soft_ce", "l1"]


class Distillation(Attack):
    """Train substitutes on the victim's answers to the thief's own images.

    Each image is asked once, as it is; augmented views of it in training are taught the same answer, so that a budget
    of n means n images charged. The images of a rung are the first n of one random order of the pool, the same for all
    rungs; a substitute depends on its own prefix only, never on the rungs before it.

    Args:
        temperature: Both answer and substitute are softened by it. 7 is what the authors of MEA-Defender use.
        loss: kl: KL(answer || substitute), batch mean. soft_ce: cross-entropy with the answer (the same gradient).
            l1: sum over the classes of the absolute difference of probabilities, batch mean.
        scale_by_temperature_squared: Multiply the loss by temperature**2, as Hinton et al. do, so that its gradient
            does not shrink with the temperature. The authors of MEA-Defender leave it out.
        requery: Ask the victim for every augmented batch of every epoch, as the authors' code does. Each budget then
            pays for a whole training: budget / epochs images are asked once per epoch, and nothing is shared between
            budgets, so the sum of the budgets is charged.
        query_chunk: Images in a query; the answers of one are on the disk before the next is asked.
        validation_fraction: Part of the answered images that is held out to stop early on the fidelity there. Used
            only with `training.early_stop_patience`; charged like all others.
        floor: Least probability assumed for a class when the temperature is not 1. API answers hold zeros (top-k,
            rounding, labels only), whose logarithm does not exist; 1e-12 is a logit 27.6 below certainty.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531.
        Lv et al., MEA-Defender, 2024, https://arxiv.org/abs/2401.15239; its `model_distillation.py`.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(
        self,
        *,
        temperature: float = 7.0,
        loss: Loss = "kl",
        scale_by_temperature_squared: bool = False,
        requery: bool = False,
        query_chunk: int = 1024,
        validation_fraction: float = 0.0,
        floor: float = 1e-12,
    ) -> None:
        if temperature <= 0:
            raise ConfigError(f"temperature={temperature} must be positive; 1 leaves the answers as they are")
        if query_chunk < 1:
            raise ConfigError(f"query_chunk={query_chunk} must be at least 1 image")
        if not 0 <= validation_fraction < 1:
            raise ConfigError(f"validation_fraction={validation_fraction} must lie in [0, 1)")
        if not 0 < floor < 1e-2:
            raise ConfigError(f"floor={floor} must lie between 0 and 0.01, both excluded; it stands for zero")
        self.temperature = temperature
        self.loss: Loss = loss
        self.scale = temperature**2 if scale_by_temperature_squared else 1.0
        self.requery = requery
        self.query_chunk = query_chunk
        self.validation_fraction = validation_fraction
        self.floor = floor

    def charges(self, budgets: Sequence[int]) -> int:
        """Return the largest budget; with `requery` the sum of all, whose rungs share no answer."""
        return sum(budgets) if self.requery else max(budgets)

    def held(self, transfer: TransferSet, budgets: Sequence[int]) -> int:
        """Return the answers kept so far; with `requery` those of the transfer sets of the rungs."""
        return sum(len(self._own(transfer, b)) for b in budgets) if self.requery else len(transfer)

    def check(self, pool_size: int, budgets: Sequence[int], training: Mapping[str, Any]) -> None:
        """Refuse what ``run`` could not finish; see ``Attack.check``."""
        # With `requery` images are asked again and again, so that a small pool can spend any budget.
        super().check(max(pool_size, *budgets) if self.requery and budgets else pool_size, budgets, training)
        if training.get("early_stop_patience") is not None and not self.validation_fraction:
            raise ConfigError(
                f"early_stop_patience={training['early_stop_patience']} of the substitute needs held-out answers; set "
                "thief.attack.validation_fraction (e.g. 0.1) or thief.training.early_stop_patience=null"
            )
        for budget in budgets:
            kept, held_out = self._sizes(budget, pool_size, training)
            if kept < 1 or (held_out < 1 and training.get("early_stop_patience") is not None):
                raise ConfigError(
                    f"a budget of {budget} leaves {kept} images to train on and {held_out} to validate with; raise "
                    "thief.budgets, or change thief.attack.validation_fraction or thief.training.epochs"
                )

    def run(
        self,
        blackbox: BlackBox,
        pool: Images,
        *,
        budgets: Sequence[int],
        make_model: MakeModel,
        training: Mapping[str, Any],
        seed: int,
        transfer: TransferSet | None = None,
        skip: Container[int] = (),
    ) -> Iterator[Rung]:
        """Spend the budget and yield one freshly trained substitute per rung; see ``Attack.run``."""
        self.check(len(pool), budgets, training)
        transfer = transfer if transfer is not None else TransferSet()
        order = numpy_generator(seed, "queries").permutation(len(pool)).astype(np.int64)
        rungs = [budget for budget in budgets if budget not in skip]
        # With `requery` no two rungs share an answer, so each keeps a transfer set of its own.
        sets = {budget: self._own(transfer, budget) if self.requery else transfer for budget in rungs}
        if rungs:
            held = self.held(transfer, rungs)
            # What was answered but not kept before a kill is charged already, and asking it again is free: one query,
            # and with `requery` the answers that were waiting for a chunk to be full.
            lost = (2 if self.requery else 1) * self.query_chunk if transfer.path is not None else 0
            _check_remaining(blackbox, self.charges(rungs) - held, lost)
        rung = partial(self._rung, blackbox, pool, order, make_model, dict(training), seed)
        return (rung(budget, sets[budget]) for budget in rungs)

    @staticmethod
    def _own(transfer: TransferSet, budget: int) -> TransferSet:
        return TransferSet(transfer.path / f"requery-{budget}" if transfer.path is not None else None)

    def _sizes(self, budget: int, pool_size: int, training: Mapping[str, Any]) -> tuple[int, int]:
        """Return how many images a rung trains on, and how many it holds out; what they cost is within the budget."""
        fraction = self.validation_fraction if training.get("early_stop_patience") is not None else 0.0
        epochs = int(training.get("epochs", 20)) if self.requery else 1
        # Held-out images are asked once, training images once per epoch.
        count = min(pool_size, int(budget / (fraction + (1 - fraction) * epochs))) if self.requery else budget
        while count and round(fraction * count) + (count - round(fraction * count)) * epochs > budget:
            count -= 1
        return count - round(fraction * count), round(fraction * count)

    def _rung(
        self,
        blackbox: BlackBox,
        pool: Images,
        order: Indices,
        make_model: MakeModel,
        training: dict[str, Any],
        seed: int,
        budget: int,
        transfer: TransferSet,
    ) -> Rung:
        kept, held_out = self._sizes(budget, len(pool), training)
        images, unseen = order[:kept], order[kept : kept + held_out]
        asker = Asker(blackbox, transfer, self.query_chunk)
        if self.requery:
            answers = asker.ask(unseen, pool[unseen]) if held_out else np.empty((0, blackbox.classes), np.float32)
            objective: Objective = Requery(self, lambda positions, views: asker.ask(images[positions], views))
        else:
            fill(blackbox, transfer, pool, order, budget, self.query_chunk)
            _, everything = transfer.prefix(budget)
            answers = everything[kept:]
            objective = Distil(self, everything[:kept])
        # The caller's random stream is left alone; the initial weights depend on the seed and the budget only.
        with torch.random.fork_rng([]):
            torch.manual_seed(derive(seed, "substitute", budget))
            model = make_model()
        if isinstance(model, ImageModel):
            model.set_normalisation(*channel_statistics(pool))
        agreement = partial(_agreement, images=pool[unseen], said=answers.argmax(1)) if held_out else None
        try:
            report: TrainReport = train(
                model,
                pool[images],
                None,
                objective,
                seed=derive(seed, "training", budget),
                validate=agreement,
                **training,
            )
        finally:
            asker.flush()
        return Rung(budget, asker.asked if self.requery else budget, model, report.epochs, report.seconds)

    def soften(self, answers: Tensor) -> Tensor:
        """Turn answers into targets of the loss.

        At temperature T the answer p becomes softmax(log max(p, floor) / T): for p = softmax(z) above the floor this is
        softmax(z / T), which the victim's logits z would have given. At T = 1 rows are only brought to sum 1, since
        top-k answers hide a part, and zeros stay.

        Args:
            answers: float32, (N, classes), negative values count as 0.

        Returns:
            float32, (N, classes), rows sum to 1 (a row of zeros stays one at T = 1 and teaches nothing).
        """
        answers = answers.float().clamp_min(0)
        if self.temperature == 1:
            return answers / answers.sum(1, keepdim=True).clamp_min(self.floor)
        return F.softmax(answers.clamp_min(self.floor).log() / self.temperature, dim=1)

    def distance(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of substitute logits, (N, classes), against softened targets of that shape: a scalar."""
        log_said = F.log_softmax(logits.float() / self.temperature, dim=1)
        if self.loss == "kl":
            value = F.kl_div(log_said, targets, reduction="batchmean")
        elif self.loss == "soft_ce":
            value = -(targets * log_said).sum(1).mean()
        else:
            value = (log_said.exp() - targets).abs().sum(1).mean()
        return self.scale * value


class Distil(Objective):
    """One answer per image, taught to every augmented view of it.

    Args:
        attack: The loss and its temperature.
        answers: float32, (N, classes), of the images that are trained on, in their order.
    """

    def __init__(self, attack: Distillation, answers: Answers) -> None:
        super().__init__()
        self.attack = attack
        self.targets = attack.soften(torch.from_numpy(np.ascontiguousarray(answers)))

    def start(self, context: StepContext) -> None:
        """Move the targets to the device."""
        super().start(context)
        self.targets = self.targets.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``{"distillation": loss}``."""
        return {"distillation": self.attack.distance(model(batch.images), self.targets[batch.indices])}


class Requery(Objective):
    """The victim's own answer to each augmented batch.

    Args:
        attack: The loss and its temperature.
        ask: Positions in the training set, int64 (N,), and float32 images (N, C, H, W) in [0, 1], to answers.
    """

    def __init__(self, attack: Distillation, ask: Callable[[Indices, npt.NDArray[np.float32]], Answers]) -> None:
        super().__init__()
        self.attack, self.ask = attack, ask

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Ask the victim, and return ``{"distillation": loss}``."""
        asked = batch.images.detach().float().cpu().contiguous().numpy()
        answers = torch.from_numpy(self.ask(batch.indices.cpu().numpy(), asked)).to(self.context.device)
        return {"distillation": self.attack.distance(model(batch.images), self.attack.soften(answers))}


def _agreement(model: nn.Module, *, images: Images, said: npt.NDArray[np.int64]) -> float:
    return metrics.fidelity(metrics.predictions(model, images), said)


def _check_remaining(blackbox: BlackBox, needed: int, lost: int) -> None:
    remaining = blackbox.remaining
    if remaining is not None and remaining + lost < needed:
        raise ConfigError(
            f"the black box answers {remaining} more images, thief.budgets needs {needed}; raise the client's budget "
            "or lower thief.budgets"
        )
