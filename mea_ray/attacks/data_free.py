"""Data-free extraction: a generator makes the queries, and its gradient is estimated through the query API."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mea_ray.attacks.base import Rung
from mea_ray.attacks.driver import Queries, Thief, TransferAttack
from mea_ray.attacks.duel import Duel, Game, OnlineDiverged, Optimizer
from mea_ray.attacks.generator import pixels
from mea_ray.core.errors import ConfigError, TrainingDiverged
from mea_ray.core.types import Answers
from mea_ray.training import device as devices
from mea_ray.training.progress import check_weights


class DataFree(TransferAttack):
    """What DFME and MAZE share: the loop, its accounts, and a student that is trained while the thief asks.

    An iteration asks for gradient estimates of the generator, then for batches that the student learns from, once
    each. Every image that is sent is charged, those of the estimates too; nothing is sent as uint8, for a difference
    of 1e-3 would not survive it. An estimate or a batch is asked whole or not at all.

    The substitute of a budget is the student as it is after the last update that the budget pays for, and not a fresh
    one trained on kept images: the papers' student is trained online, and 20 million images could not be kept. The
    curve stays honest, for a student at b queries depends on the answers to these b and on the seed alone: a run with
    b as its only budget gives the same weights. For the same reason learning rates may follow the queries spent so
    far, and never the largest budget, as the papers' annealing does; and no student is picked by its test accuracy.

    The thief's pool is never looked at, so the student does not normalise its images (``thief.learning.statistics`` is
    ignored). The rest of ``thief.learning`` but the loss applies to its targets. Of ``thief.training`` only
    ``gradient_clip`` is used, for the student: optimisers, rates and batches are the attack's own, there is no
    augmentation, and all is computed in float32, which the differences need.
    """

    settles = True
    query_chunk = 16_384
    """Files of the transfer set hold a sixteenth of it: at 1,024 a run of 20 million queries would make 60,000."""

    keeps_images = False

    def __init__(self, game: Game) -> None:
        self.game = game

    @abstractmethod
    def disagreement(self, logits: Tensor, targets: Tensor, floor: float) -> Tensor:
        """Return how far the student is from the victim: float32 (N,), differentiable by the logits.

        Args:
            logits: Of the student, float32 (N, classes).
            targets: The victim's probabilities, float32 (N, classes), rows sum to 1.
            floor: Stands for the zeros of hidden or hard answers.
        """

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return 0: the thief has no images."""
        return 0

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: Mapping[str, Any],
        learning: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse what ``run`` could not finish; see ``Attack.check``."""
        if training.get("early_stop_patience") is not None:
            raise ConfigError(
                f"early_stop_patience={training['early_stop_patience']} does not apply to a student that is trained "
                "while it asks; set thief.training.early_stop_patience=null"
            )
        super().check(pool_size, budgets, training, learning)
        loss = self.learning(learning).loss
        if loss != "kl":
            raise ConfigError(f"thief.learning.loss={loss} cannot replace the loss of this attack; leave it at kl")
        first = self.game.estimate_queries + (0 if self.game.reuses else self.game.batch_size)
        if budgets[0] < first:
            raise ConfigError(
                f"a budget of {budgets[0]} images does not reach for the student's first update, which takes {first}; "
                "raise thief.budgets, or lower thief.attack.batch_size or directions"
            )

    def queries(self, thief: Thief) -> Queries:
        """Ask estimates and batches in turn, and train both networks on the answers."""
        game = self.game
        with devices.kept_memory():
            duel = thief.online = Duel(game, self.disagreement, thief)
            try:
                while True:
                    paid: tuple[Tensor, Answers] | None = None
                    for _ in range(game.generator_steps):
                        painted, ask = duel.probe()
                        answers = yield ask
                        duel.move_generator(painted, ask, answers)
                        if game.reuses:
                            paid = pixels(painted.detach()), answers[: game.batch_size]
                    if paid is not None:
                        duel.teach(*paid)
                    for _ in range(game.student_steps - game.reuses):
                        images, ask = duel.batch()
                        answers = yield ask
                        duel.teach(images, answers)
                    for _ in range(game.replay_steps):
                        duel.teach(*duel.recall(), fresh=False)
                    duel.finish_iteration()
            finally:
                duel.student.to("cpu")

    def substitute(self, thief: Thief, budget: int) -> Rung:
        """Return a copy of the student as it is now; see the class. It saw what it asked once: one epoch."""
        duel: Duel = thief.online
        model = deepcopy(duel.student).to("cpu", memory_format=torch.contiguous_format).eval()
        try:
            check_weights(model, duel.iterations, duel.updates)
        except TrainingDiverged as error:
            raise OnlineDiverged(*error.args) from None
        return Rung(budget, thief.asked, model, 1, duel.seconds, thief.curves_within(thief.asked))


class DFME(DataFree):
    """Data-free model extraction: generator and student play against each other over their disagreement.

    The disagreement is the mean absolute difference, over the classes, of the student's logits and the victim's, which
    are recovered from its probabilities as log p - mean log p. Zeros of hard or cut answers are taken for
    ``thief.learning.floor``, which at 1e-12 makes a hard label a logit of 25: for label-only answers raise it.
    Defaults are of the paper's CIFAR-10 run, at 1,792 queries per iteration and 20 million in all.

    Args:
        batch_size: Images of an update; a gradient estimate takes ``directions + 1`` times as many.
        generator_steps: Updates of the generator per iteration; 0 leaves it random, a control.
        student_steps: Updates of the student per iteration, each on a fresh batch.
        directions: Random directions that a gradient is averaged over.
        epsilon: Length of a step in a direction, in front of the tanh that makes pixels.
        noise_size: Numbers that the generator makes an image of.
        generator_width: Channels of the generator.
        student_optimizer: Optimiser of the student; sgd has a momentum of 0.9.
        student_learning_rate: Learning rate of the student at first.
        generator_optimizer: Optimiser of the generator.
        generator_learning_rate: Learning rate of the generator at first.
        weight_decay: Weight decay of what sgd trains; adam has none.
        decay_at: Queries after which both learning rates are multiplied by ``decay_factor``.
        decay_factor: See ``decay_at``.

    References:
        Truong et al., Data-Free Model Extraction, CVPR 2021, https://arxiv.org/abs/2011.14779, algorithm 1. Their
        code steps the schedules before the first epoch, keeps the student of the best test accuracy, and can read the
        victim's true gradient unpaid; none of that is done here.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 256,
        generator_steps: int = 1,
        student_steps: int = 5,
        directions: int = 1,
        epsilon: float = 1e-3,
        noise_size: int = 256,
        generator_width: int = 128,
        student_optimizer: Optimizer = "sgd",
        student_learning_rate: float = 0.1,
        generator_optimizer: Optimizer = "adam",
        generator_learning_rate: float = 1e-4,
        weight_decay: float = 5e-4,
        decay_at: tuple[int, ...] = (2_000_000, 6_000_000, 10_000_000),
        decay_factor: float = 0.3,
    ) -> None:
        super().__init__(
            Game(
                batch_size=batch_size,
                generator_steps=generator_steps,
                student_steps=student_steps,
                directions=directions,
                epsilon=epsilon,
                noise_size=noise_size,
                generator_width=generator_width,
                student_optimizer=student_optimizer,
                student_learning_rate=student_learning_rate,
                generator_optimizer=generator_optimizer,
                generator_learning_rate=generator_learning_rate,
                weight_decay=weight_decay,
                decay_at=decay_at,
                decay_factor=decay_factor,
            )
        )

    def disagreement(self, logits: Tensor, targets: Tensor, floor: float) -> Tensor:
        """Return the mean absolute difference of logits, the victim's recovered up to a constant; see the base."""
        recovered = targets.clamp_min(floor).log()
        recovered = recovered - recovered.mean(1, keepdim=True)
        return (logits - recovered).abs().mean(1)


class MAZE(DataFree):
    """Model stealing by zeroth-order gradient estimation: as DFME, over KL(victim || student), with replay.

    Some of what was asked is kept, and the student is trained on draws of it in every iteration. Defaults are of the
    authors' code, at 1,920 queries per iteration; it asks for 5 million in all, or 30 million on CIFAR-10, and anneals
    both rates to 0 over them, which here a rung may not depend on: set ``decay_at``.

    Args:
        batch_size: Images of an update; a gradient estimate takes ``directions + 1`` times as many.
        generator_steps: Updates of the generator per iteration; 0 leaves it random, a control.
        student_steps: Updates of the student per iteration on new answers.
        replay_steps: Updates of the student per iteration on images asked before; they cost nothing.
        replay_images: Images kept for replay at most, float32 in memory; the oldest make room.
        reuse_batch: The student's first batch is the one that the generator's last gradient was estimated at, whose
            answers are paid for already.
        directions: Random directions that a gradient is averaged over.
        epsilon: Length of a step in a direction, in front of the tanh that makes pixels.
        noise_size: Numbers that the generator makes an image of.
        generator_width: Channels of the generator.
        student_optimizer: Optimiser of the student; sgd has a momentum of 0.9.
        student_learning_rate: Learning rate of the student at first.
        generator_optimizer: Optimiser of the generator.
        generator_learning_rate: Learning rate of the generator at first.
        weight_decay: Weight decay of what sgd trains; adam has none.
        decay_at: Queries after which both learning rates are multiplied by ``decay_factor``.
        decay_factor: See ``decay_at``.

    References:
        Kariyappa et al., MAZE, CVPR 2021, https://arxiv.org/abs/2005.03161, algorithm 1. As there every fresh batch is
        kept for replay; the authors' code keeps the last of an iteration only, and all of them for good.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        generator_steps: int = 1,
        student_steps: int = 5,
        replay_steps: int = 10,
        replay_images: int = 50_000,
        reuse_batch: bool = True,
        directions: int = 10,
        epsilon: float = 1e-3,
        noise_size: int = 100,
        generator_width: int = 128,
        student_optimizer: Optimizer = "sgd",
        student_learning_rate: float = 0.1,
        generator_optimizer: Optimizer = "sgd",
        generator_learning_rate: float = 1e-4,
        weight_decay: float = 5e-4,
        decay_at: tuple[int, ...] = (),
        decay_factor: float = 0.3,
    ) -> None:
        super().__init__(
            Game(
                batch_size=batch_size,
                generator_steps=generator_steps,
                student_steps=student_steps,
                replay_steps=replay_steps,
                replay_images=replay_images,
                reuse_batch=reuse_batch,
                directions=directions,
                epsilon=epsilon,
                noise_size=noise_size,
                generator_width=generator_width,
                student_optimizer=student_optimizer,
                student_learning_rate=student_learning_rate,
                generator_optimizer=generator_optimizer,
                generator_learning_rate=generator_learning_rate,
                weight_decay=weight_decay,
                decay_at=decay_at,
                decay_factor=decay_factor,
            )
        )

    def disagreement(self, logits: Tensor, targets: Tensor, floor: float) -> Tensor:
        """Return KL(victim || student); see the base."""
        return F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="none").sum(1)
