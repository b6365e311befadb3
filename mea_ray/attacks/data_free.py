"""Data-free extraction: a generator makes the queries, and its gradient is estimated through the query API."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mea_ray.attacks.base import Rung
from mea_ray.attacks.game_state import GameSnapshots
from mea_ray.attacks.generator_game import (
    GameSettings,
    GeneratorGame,
    GeneratorSettings,
    OnlineDiverged,
    ReplaySettings,
    StudentSettings,
)
from mea_ray.attacks.image_generator import pixels
from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief, refuse_unlean
from mea_ray.config import LearningConfig, TrainingConfig
from mea_ray.core.errors import ConfigError, TrainingDiverged
from mea_ray.core.types import Answers
from mea_ray.training import device as devices
from mea_ray.training.progress import check_weights

BatchSize = Annotated[int, Field(ge=2)]
DecayFactor = Annotated[float, Field(gt=0, le=1)]
WeightDecay = Annotated[float, Field(ge=0)]


class DataFree(QueryAttack):
    """Base of DFME and MAZE: their loop, its query count, and a student that is trained while the thief queries.

    An iteration first queries gradient estimates of the generator, then batches that the student is trained on once.
    Every image that is sent is charged, those of the estimates too. Images are sent as floats, because a difference of
    1e-3 would not survive uint8. An estimate or a batch is queried whole or not at all.

    The substitute of a budget is the student after the last update that the budget pays for. It is not trained anew on
    stored images: the papers' student is trained online, and 20 million images could not be stored. The curve stays
    honest, because a student at b queries depends on the answers to these b and on the seed alone: a run with b as its
    only budget gives the same weights. For the same reason learning rates may follow the queries spent so far, but
    never the largest budget, as the papers' annealing does; and no student is selected by its test accuracy.

    The thief's pool is never used, so the student does not normalise its images (``thief.learning.statistics`` is
    ignored). The rest of ``thief.learning`` but the loss applies to its targets. Of ``thief.training`` only
    ``gradient_clip`` is used, for the student. Optimisers, rates and batches are the attack's own, there is no
    augmentation, and everything is computed in float32, which the differences need.

    The state of both networks is written between iterations, as often as ``resources.snapshot_every_s`` says. A run
    that was killed goes on from there, bit for bit.
    """

    trains_online = True
    query_chunk = 16_384
    """Files of the transfer set hold a sixteenth of it: at 1,024 a run of 20 million queries would make 60,000."""

    keeps_images = False
    renamed = {
        **{f"student_{name}": f"student.{name}" for name in ("steps", "optimizer", "learning_rate")},
        **{f"generator_{name}": f"generator.{name}" for name in ("steps", "width", "optimizer", "learning_rate")},
        **{name: f"generator.{name}" for name in ("noise_size", "directions", "epsilon")},
    }
    """Old option names; see ``mea_ray.core.registry``."""

    def __init__(self, game: GameSettings) -> None:
        self.game = game

    @abstractmethod
    def disagreement(self, logits: Tensor, targets: Tensor, floor: float) -> Tensor:
        """Return how far the student is from the victim: float32 (N,), differentiable by the logits.

        Args:
            logits: Of the student, float32 (N, classes).
            targets: The victim's probabilities, float32 (N, classes), rows sum to 1.
            floor: Replaces the zeros of hidden or hard answers.
        """

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return 0: the thief has no images."""
        return 0

    def smallest_batch(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: TrainingConfig,
        learning: LearningConfig = LearningConfig(),
    ) -> int:
        """Return the batch size of student and generator, which the thief's training does not set."""
        return self.game.batch_size

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
        if training.early_stop_patience is not None:
            raise ConfigError(
                f"early_stop_patience={training.early_stop_patience} does not apply to a student that is trained "
                "while it queries; set thief.training.early_stop_patience=null"
            )
        super().check(pool_size, budgets, training, learning, labelled=labelled)
        refuse_unlean(self.learning(learning), "this attack learns from answers as they come")
        loss = self.learning(learning).loss
        if loss != "kl":
            raise ConfigError(f"thief.learning.loss={loss} cannot replace the loss of this attack; leave it at kl")
        first = self.game.estimate_queries + (0 if self.game.reuses else self.game.batch_size)
        if budgets[0] < first:
            raise ConfigError(
                f"a budget of {budgets[0]} images does not cover the student's first update, which takes {first}; "
                "raise thief.budgets, or lower thief.attack.batch_size or thief.attack.generator.directions"
            )

    def queries(self, thief: Thief) -> Queries:
        """Query gradient estimates and batches in turn, and train both networks on the answers."""
        settings = self.game
        with devices.retain_freed_memory():
            game = thief.online = GeneratorGame(settings, self.disagreement, thief)
            snapshots = GameSnapshots(game, thief.snapshots("game"))
            snapshots.resume()
            try:
                while True:
                    paid: tuple[Tensor, Answers] | None = None
                    for _ in range(settings.generator.steps):
                        outputs, query = game.probe()
                        answers = yield query
                        game.move_generator(outputs, query, answers)
                        if settings.reuses:
                            paid = pixels(outputs.detach()), answers[: settings.batch_size]
                    if paid is not None:
                        game.teach(*paid)
                    for _ in range(settings.student.steps - settings.reuses):
                        images, query = game.batch()
                        answers = yield query
                        game.teach(images, answers)
                    for _ in range(settings.replay.steps):
                        game.teach(*game.recall(), fresh=False)
                    game.finish_iteration()
                    snapshots.iteration_done()
            finally:
                game.student.to("cpu")

    def substitute(self, thief: Thief, budget: int) -> Rung:
        """Return a copy of the student as it is now; see the class. It saw each query once: one epoch."""
        game: GeneratorGame = thief.online
        model = deepcopy(game.student).to("cpu").to(memory_format=torch.contiguous_format).eval()
        try:
            check_weights(model, game.iterations, game.updates)
        except TrainingDiverged as error:
            raise OnlineDiverged(*error.args) from None
        return Rung(budget, thief.queries_spent, model, 1, game.seconds, thief.curves_within(thief.queries_spent))


class DFME(DataFree):
    """Data-free model extraction: generator and student are trained against each other over their disagreement.

    Choose it for a thief without images and with a very large budget.

    The disagreement is the mean absolute difference, over the classes, of the student's logits and the victim's, which
    are recovered from its probabilities as log p - mean log p. Zeros of hard or cut answers are replaced by
    ``thief.learning.floor``. At 1e-12 this makes a hard label a logit of 25; raise it for label-only answers. Defaults
    are those of the paper's CIFAR-10 run, at 1,792 queries per iteration and 20 million in all.

    Args:
        batch_size: Images of an update; a gradient estimate takes ``directions + 1`` times as many.
        student: Training of the student.
        generator: The generator, its training, and its gradient estimates.
        weight_decay: Weight decay of networks trained with sgd; adam has none.
        decay_at: Queries after which both learning rates are multiplied by ``decay_factor``.
        decay_factor: See ``decay_at``.

    References:
        Truong et al., Data-Free Model Extraction, CVPR 2021, https://arxiv.org/abs/2011.14779, algorithm 1. Their
        code steps the schedules before the first epoch, keeps the student of the best test accuracy, and can read the
        victim's true gradient for free; none of that is done here.

    Raises:
        ConfigError: ``decay_at`` does not rise.
    """

    def __init__(
        self,
        *,
        batch_size: BatchSize = 256,
        student: StudentSettings = StudentSettings(),
        generator: GeneratorSettings = GeneratorSettings(),
        weight_decay: WeightDecay = 5e-4,
        decay_at: tuple[int, ...] = (2_000_000, 6_000_000, 10_000_000),
        decay_factor: DecayFactor = 0.3,
    ) -> None:
        super().__init__(
            GameSettings(
                batch_size=batch_size,
                student=student,
                generator=generator,
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
    """Model stealing by zeroth-order gradient estimation: as DFME, with KL(victim || student) and replay.

    Choose it to compare with dfme: it also trains again on earlier answers.

    Queried images are stored, and the student is trained on draws of them in every iteration. Defaults are those of
    the authors' code, at 1,920 queries per iteration. It queries 5 million in all, or 30 million on CIFAR-10, and
    anneals both rates to 0 over them, which a rung may not depend on here: set ``decay_at``.

    Args:
        batch_size: Images of an update; a gradient estimate takes ``directions + 1`` times as many.
        student: Training of the student.
        generator: The generator, its training, and its gradient estimates.
        replay: Training on answers that were paid for already.
        weight_decay: Weight decay of networks trained with sgd; adam has none.
        decay_at: Queries after which both learning rates are multiplied by ``decay_factor``.
        decay_factor: See ``decay_at``.

    References:
        Kariyappa et al., MAZE, CVPR 2021, https://arxiv.org/abs/2005.03161, algorithm 1. As there every fresh batch is
        stored for replay; the authors' code stores the last of an iteration only, and all of them forever.

    Raises:
        ConfigError: The replay memory does not hold a batch, or ``decay_at`` does not rise.
    """

    renamed = {
        **DataFree.renamed,
        "replay_steps": "replay.steps",
        "replay_images": "replay.images",
        "reuse_batch": "replay.reuse_batch",
    }

    def __init__(
        self,
        *,
        batch_size: BatchSize = 128,
        student: StudentSettings = StudentSettings(),
        generator: GeneratorSettings = GeneratorSettings(noise_size=100, optimizer="sgd", directions=10),
        replay: ReplaySettings = ReplaySettings(steps=10, images=50_000, reuse_batch=True),
        weight_decay: WeightDecay = 5e-4,
        decay_at: tuple[int, ...] = (),
        decay_factor: DecayFactor = 0.3,
    ) -> None:
        super().__init__(
            GameSettings(
                batch_size=batch_size,
                student=student,
                generator=generator,
                replay=replay,
                weight_decay=weight_decay,
                decay_at=decay_at,
                decay_factor=decay_factor,
            )
        )

    def disagreement(self, logits: Tensor, targets: Tensor, floor: float) -> Tensor:
        """Return KL(victim || student); see the base."""
        return F.kl_div(F.log_softmax(logits, dim=1), targets, reduction="none").sum(1)
