"""A student and a generator that are trained against each other on the answers of a query API.

Nothing is queried here: the game makes the images, and is given their answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from mea_ray.attacks.image_generator import ImageGenerator, pixels
from mea_ray.attacks.thief import Query, Thief
from mea_ray.config import TrainingConfig
from mea_ray.core.errors import ConfigError, TrainingDiverged
from mea_ray.core.seeding import derive
from mea_ray.core.settings import Settings
from mea_ray.core.types import Answers
from mea_ray.training import device as devices
from mea_ray.training.schedule import make_optimizer

Optimizer = Literal["sgd", "adam"]
Rate = Annotated[float, Field(gt=0)]

LOG_EVERY = 20
"""Iterations that are averaged into one point of a curve."""
MOMENTUM = 0.9
"""Momentum of sgd, as in both papers."""


class StudentSettings(Settings):
    """Training of the student.

    Attributes:
        steps: Updates per iteration, each on newly queried images.
        optimizer: sgd has a momentum of 0.9.
        learning_rate: Initial learning rate.
    """

    steps: Annotated[int, Field(ge=1)] = 5
    optimizer: Optimizer = "sgd"
    learning_rate: Rate = 0.1


class GeneratorSettings(Settings):
    """The generator of images and its training.

    Attributes:
        steps: Updates per iteration; 0 leaves the generator random, a baseline.
        noise_size: Length of the noise vector that becomes an image.
        width: Channels of the generator.
        optimizer: sgd has a momentum of 0.9.
        learning_rate: Initial learning rate.
        directions: Random directions that a gradient estimate is averaged over.
        epsilon: Length of a step in a direction, in front of the tanh that makes pixels.
    """

    steps: Annotated[int, Field(ge=0)] = 1
    noise_size: Annotated[int, Field(ge=1)] = 256
    width: Annotated[int, Field(ge=2)] = 128
    optimizer: Optimizer = "adam"
    learning_rate: Rate = 1e-4
    directions: Annotated[int, Field(ge=1)] = 1
    epsilon: Annotated[float, Field(gt=0)] = 1e-3


class ReplaySettings(Settings):
    """Answers that the student is trained on again, at no query.

    Attributes:
        steps: Updates of the student per iteration on images queried before.
        images: Most images stored for replay, float32 in memory; the newest replace the oldest.
        reuse_batch: The student's first batch of an iteration is the one at which the generator's last gradient was
            estimated, whose answers are paid for already.
    """

    steps: Annotated[int, Field(ge=0)] = 0
    images: Annotated[int, Field(ge=0)] = 0
    reuse_batch: bool = False


@dataclass(frozen=True, kw_only=True)
class GameSettings:
    """The settings of a data-free attack; documented in ``attacks.data_free``, where a config sets them.

    Raises:
        ConfigError: The replay memory does not hold a batch, or ``decay_at`` does not rise.
    """

    batch_size: int
    student: StudentSettings
    generator: GeneratorSettings
    weight_decay: float
    decay_at: tuple[int, ...]
    decay_factor: float
    replay: ReplaySettings = ReplaySettings()

    def __post_init__(self) -> None:
        if self.replay.steps and self.replay.images < self.batch_size:
            raise ConfigError(
                f"replay.images={self.replay.images} must hold a batch of {self.batch_size}; or set replay.steps=0"
            )
        if any(a >= b for a, b in zip((0, *self.decay_at), self.decay_at, strict=False)):
            raise ConfigError(f"decay_at={list(self.decay_at)} must be positive, strictly ascending numbers of queries")

    @property
    def reuses(self) -> bool:
        """Whether a student's batch of each iteration was paid for by a gradient estimate."""
        return self.replay.reuse_batch and self.generator.steps > 0

    @property
    def estimate_queries(self) -> int:
        """Images charged for the generator's updates in one iteration."""
        return self.generator.steps * self.batch_size * (self.generator.directions + 1)

    @property
    def iteration_queries(self) -> int:
        """Images charged for one iteration."""
        return self.estimate_queries + self.batch_size * (self.student.steps - self.reuses)

    def rate(self, queries: int) -> float:
        """Return what both learning rates are multiplied by after a number of queries."""
        return float(self.decay_factor ** sum(queries >= mark for mark in self.decay_at))


Disagreement = Callable[[Tensor, Tensor, float], Tensor]
"""Student's logits and victim's probabilities, (N, classes), and the floor of the latter, to values (N,)."""


def forward_differences(base: Tensor, moved: Tensor, directions: Tensor, epsilon: float) -> Tensor:
    """Estimate the gradient of a function from its values, by forward differences along random directions.

    For directions u uniform on the unit sphere of d dimensions E[u u^T] = I / d, hence the factor d. Up to terms in
    ``epsilon`` the expectation is the gradient.

    Args:
        base: Values at each of N points, (N,).
        moved: Values at the points moved by ``epsilon`` along each of m directions, (m, N).
        directions: Unit vectors, (m, N, ...).
        epsilon: Length of the steps.

    Returns:
        Mean over the directions of d (moved - base) / epsilon u, (N, ...).

    References:
        Truong et al., 2021, https://arxiv.org/abs/2011.14779, section 3.2; Kariyappa et al., 2021,
        https://arxiv.org/abs/2005.03161, section 4.2.
    """
    dimensions = math.prod(directions.shape[2:])
    slopes = dimensions * (moved - base) / epsilon
    return (slopes.view(*slopes.shape, *[1] * (directions.ndim - 2)) * directions).mean(0)


class GeneratorGame:
    """Student and generator, their optimisers, and their random streams, all derived from the thief's seed.

    Args:
        game: The settings.
        disagreement: Measure that the student lowers and the generator raises.
        thief: Its learning settings, seed and networks are used; its ``queries_spent`` drives the learning rates.

    Attributes:
        student: On the device of this process.
        streams: All random streams.
        updates: Updates of the student so far.
        seconds: Time spent on both networks, without waiting for answers.
    """

    def __init__(self, game: GameSettings, disagreement: Disagreement, thief: Thief) -> None:
        self.game, self.disagreement, self.thief = game, disagreement, thief
        self.updates, self.seconds = 0, 0.0
        self.where = devices.device()
        self.student = _without_statistics(thief).new_model("student").to(self.where)
        with torch.random.fork_rng(devices.fork_devices(self.where)):
            torch.manual_seed(derive(thief.seed, "generator"))
            self.generator = ImageGenerator(game.generator.noise_size, thief.image_shape, game.generator.width)
        self.generator.to(self.where).train()
        self.clip: float | None = thief.training.gradient_clip
        self.optimisers = {
            "student": self._optimiser(self.student, game.student),
            "generator": self._optimiser(self.generator, game.generator),
        }
        self.noise, self.sphere, self.draws, self.mixing = self.streams = [
            torch.Generator().manual_seed(derive(thief.seed, name)) for name in ("noise", "sphere", "replay", "mixing")
        ]
        self.directions = torch.empty(0)
        self.memory: tuple[Tensor, npt.NDArray[np.float32]] | None = None
        self.stored = 0
        self.iterations = 0
        self.sums: dict[str, list[float]] = {}

    def probe(self) -> tuple[Tensor, Query]:
        """Make a batch, and the query of it together with the same batch moved along random directions.

        Returns:
            The generator's outputs, (N, C, H, W), with their graph, for ``move_generator``; and the query of (m + 1) N
            images.
        """
        with self._working():
            outputs = self._generate()
            shape = (self.game.generator.directions, *outputs.shape)
            directions = torch.randn(shape, generator=self.sphere)
            norms = directions.flatten(2).norm(dim=2).view(*shape[:2], 1, 1, 1)
            self.directions = (directions / norms).to(self.where)
            moved = outputs.detach() + self.game.generator.epsilon * self.directions
            images = pixels(torch.cat([outputs.detach()[None], moved])).flatten(0, 1)
        return outputs, self._query(images)

    def move_generator(self, outputs: Tensor, query: Query, answers: Answers) -> None:
        """Update the generator to raise the disagreement, along the gradient estimated from the answers of a probe."""
        with self._working():
            self.student.eval()
            images = torch.from_numpy(np.ascontiguousarray(query.images)).to(self.where)
            with torch.no_grad():
                values = self._disagreement(images, self._soften(answers)).view(-1, len(outputs))
            estimate = forward_differences(values[0], values[1:], self.directions, self.game.generator.epsilon)
            self._check_finite({"disagreement": float(values.mean())})
            self._add("disagreement", float(values[0].mean()), len(outputs))
            # Of the batch mean, and negative because the optimiser descends.
            outputs.backward(-estimate / len(outputs))  # type: ignore[no-untyped-call]
            self._step("generator", self.generator, self.game.generator.learning_rate)

    def batch(self) -> tuple[Tensor, Query]:
        """Make a batch for the student: images, (N, C, H, W), and their query."""
        with self._working(), torch.no_grad():
            images = pixels(self._generate())
        return images, self._query(images)

    def teach(self, images: Tensor, answers: Answers, *, fresh: bool = True) -> None:
        """Train the student on one answered batch; store it for replay if it is ``fresh``.

        Raises:
            OnlineDiverged: The loss is not finite.
        """
        with self._working(), torch.random.fork_rng(devices.fork_devices(self.where)):
            # Dropout draws from the global stream.
            torch.manual_seed(derive(self.thief.seed, "dropout", self.updates))
            self.student.train()
            batch, targets = self.thief.learning.mix(images, self._soften(answers), self.mixing)
            loss = self._disagreement(batch, targets).mean()
            value = float(loss.detach())
            self._check_finite({"student": value})
            loss.backward()  # type: ignore[no-untyped-call]
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
            self._step("student", self.student, self.game.student.learning_rate)
            self.updates += 1
            if not fresh:
                return
            self._add("student_loss", value, len(images))
            if self.game.replay.steps:
                self._store(images, answers)

    def recall(self) -> tuple[Tensor, Answers]:
        """Draw a batch from the replay memory, with replacement."""
        assert self.memory is not None
        size = min(self.stored, self.game.replay.images)
        chosen = torch.randint(size, (self.game.batch_size,), generator=self.draws)
        return self.memory[0][chosen].to(self.where), self.memory[1][chosen.numpy()]

    def make_memory(self, shape: Sequence[int], classes: int) -> None:
        """Make room for the replay of images, (C, H, W), and of their answers."""
        size = self.game.replay.images
        self.memory = torch.empty((size, *shape)), np.empty((size, classes), np.float32)

    def finish_iteration(self) -> None:
        """Log the means of the losses every ``LOG_EVERY`` iterations."""
        self.iterations += 1
        if self.iterations % LOG_EVERY == 0:
            for name, (total, count) in self.sums.items():
                self.thief.log(name, total / count)
            self.sums = {}

    def _generate(self) -> Tensor:
        noise = torch.randn((self.game.batch_size, self.game.generator.noise_size), generator=self.noise)
        outputs: Tensor = self.generator(noise.to(self.where))
        return outputs

    def _query(self, images: Tensor) -> Query:
        self._check_finite({"images": float(images.sum())})
        return Query(np.ascontiguousarray(images.cpu().numpy()), learn=False, whole=True)

    def _check_finite(self, terms: dict[str, float]) -> None:
        if not all(map(math.isfinite, terms.values())):
            raise OnlineDiverged(self.iterations, self.updates, terms)

    def _soften(self, answers: Answers) -> Tensor:
        return self.thief.learning.soften(torch.from_numpy(np.ascontiguousarray(answers)).to(self.where))

    def _disagreement(self, images: Tensor, targets: Tensor) -> Tensor:
        learning = self.thief.learning
        temperature = learning.effective_temperature
        scale = temperature**2 if learning.scale_by_temperature_squared else 1.0
        return scale * self.disagreement(self.student(images) / temperature, targets, learning.floor)

    def _optimiser(self, model: nn.Module, settings: StudentSettings | GeneratorSettings) -> torch.optim.Optimizer:
        training = TrainingConfig(
            optimizer=settings.optimizer,
            learning_rate=settings.learning_rate,
            weight_decay=self.game.weight_decay if settings.optimizer == "sgd" else 0.0,
            momentum=MOMENTUM,
        )
        return make_optimizer(model, self.where, training)

    def _step(self, name: str, model: nn.Module, learning_rate: float) -> None:
        for group in self.optimisers[name].param_groups:
            group["lr"] = learning_rate * self.game.rate(self.thief.queries_spent)
        self.optimisers[name].step()
        model.zero_grad(set_to_none=True)

    def _store(self, images: Tensor, answers: Answers) -> None:
        if self.memory is None:
            self.make_memory(images.shape[1:], answers.shape[1])
        assert self.memory is not None
        places = (self.stored + np.arange(len(images))) % self.game.replay.images
        self.memory[0][torch.from_numpy(places)] = images.cpu()
        self.memory[1][places] = answers
        self.stored += len(images)

    def _add(self, name: str, value: float, count: int) -> None:
        total, so_far = self.sums.get(name, [0.0, 0])
        self.sums[name] = [total + value * count, so_far + count]

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Compute in full precision, and count the time; never active while waiting for answers."""
        started = time.perf_counter()
        try:
            with devices.exact():
                yield
        finally:
            self.seconds += time.perf_counter() - started


def _without_statistics(thief: Thief) -> Thief:
    """Return a thief whose networks see pixels in [0, 1]: without a pool there are no statistics to normalise by."""
    return replace(thief, learning=thief.learning.model_copy(update={"statistics": "none"}))


class OnlineDiverged(TrainingDiverged):
    """A network of a data-free attack is no longer finite.

    Args:
        epoch: Iteration, from 0.
        step: Updates of the student before.
        terms: The values that are not finite; empty for the student's weights.
    """

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.terms.items())
        return (
            f"a data-free attack diverged in iteration {self.epoch}, update {self.step} of the student "
            f"({values or 'its weights'} not finite); lower thief.attack.student.learning_rate or "
            "generator.learning_rate, or set thief.training.gradient_clip (e.g. 1.0)"
        )
