"""A student and a generator that play against each other over the answers of a query API; no query is asked here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mea_ray.attacks.driver import Ask, Thief
from mea_ray.attacks.generator import Generator, pixels
from mea_ray.core.errors import ConfigError, TrainingDiverged
from mea_ray.core.seeding import derive
from mea_ray.core.types import Answers
from mea_ray.training import device as devices
from mea_ray.training.schedule import make_optimizer

Optimizer = Literal["sgd", "adam"]

LOG_EVERY = 20
"""Iterations whose means make one point of a curve."""
MOMENTUM = 0.9
"""Of sgd; both papers."""


@dataclass(frozen=True, kw_only=True)
class Game:
    """The constants of a data-free attack; documented where a config sets them, in ``attacks.data_free``.

    Raises:
        ConfigError: A value is out of its range.
    """

    batch_size: int
    generator_steps: int
    student_steps: int
    directions: int
    epsilon: float
    noise_size: int
    generator_width: int
    student_optimizer: Optimizer
    student_learning_rate: float
    generator_optimizer: Optimizer
    generator_learning_rate: float
    weight_decay: float
    decay_at: tuple[int, ...]
    decay_factor: float
    replay_steps: int = 0
    replay_images: int = 0
    reuse_batch: bool = False

    def __post_init__(self) -> None:
        least = {"batch_size": 2, "generator_steps": 0, "student_steps": 1, "directions": 1}  # a batch is normalised
        least |= {"noise_size": 1, "generator_width": 2, "weight_decay": 0, "replay_steps": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {bound}")
        for name in ("epsilon", "student_learning_rate", "generator_learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        for name in ("student_optimizer", "generator_optimizer"):
            if getattr(self, name) not in {"sgd", "adam"}:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be sgd or adam")
        if self.replay_steps and self.replay_images < self.batch_size:
            raise ConfigError(
                f"replay_images={self.replay_images} must hold a batch of {self.batch_size}; or set replay_steps=0"
            )
        if not 0 < self.decay_factor <= 1:
            raise ConfigError(f"decay_factor={self.decay_factor} must lie in (0, 1]; 1 keeps the learning rates")
        if any(a >= b for a, b in zip((0, *self.decay_at), self.decay_at, strict=False)):
            raise ConfigError(f"decay_at={list(self.decay_at)} must be positive, strictly rising numbers of queries")

    @property
    def reuses(self) -> bool:
        """Whether a student's batch of each iteration is one that an estimate paid for."""
        return self.reuse_batch and self.generator_steps > 0

    @property
    def estimate_queries(self) -> int:
        """Images that the generator's updates of one iteration are charged."""
        return self.generator_steps * self.batch_size * (self.directions + 1)

    @property
    def iteration_queries(self) -> int:
        """Images that one iteration is charged."""
        return self.estimate_queries + self.batch_size * (self.student_steps - self.reuses)

    def rate(self, queries: int) -> float:
        """What both learning rates are multiplied by after a number of queries."""
        return float(self.decay_factor ** sum(queries >= mark for mark in self.decay_at))


Disagreement = Callable[[Tensor, Tensor, float], Tensor]
"""Student's logits and victim's probabilities, (N, classes), and the floor of the latter, to values (N,)."""


def forward_differences(base: Tensor, moved: Tensor, directions: Tensor, epsilon: float) -> Tensor:
    """Estimate the gradient of a function from its values, by forward differences along random directions.

    For directions u uniform on the unit sphere of d dimensions E[u u^T] = I / d, hence the factor d: up to terms in
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


class Duel:
    """Both networks, their optimisers, and random streams of their own, all from the thief's seed.

    Args:
        game: The constants.
        disagreement: What the student lowers and the generator raises.
        thief: Whose learning settings, seed and make of model are used; its ``asked`` drives the learning rates.

    Attributes:
        student: On the device of this process.
        updates: Updates of the student so far.
        seconds: Time that both networks took, without that of the answers.
    """

    def __init__(self, game: Game, disagreement: Disagreement, thief: Thief) -> None:
        self.game, self.disagreement, self.thief = game, disagreement, thief
        self.updates, self.seconds = 0, 0.0
        self.where = devices.device()
        # Without a pool there are no statistics to normalise by: the student sees pixels in [0, 1] as they are.
        unread = replace(thief, learning=replace(thief.learning, statistics="none"))
        self.student = unread.new_model("student").to(self.where)
        with torch.random.fork_rng(devices.fork_devices(self.where)):
            torch.manual_seed(derive(thief.seed, "generator"))
            self.generator = Generator(game.noise_size, thief.image_shape, game.generator_width)
        self.generator.to(self.where).train()
        self.clip: float | None = thief.training.get("gradient_clip")
        self.optimisers = {
            "student": self._optimiser(self.student, game.student_optimizer, game.student_learning_rate),
            "generator": self._optimiser(self.generator, game.generator_optimizer, game.generator_learning_rate),
        }
        self.noise, self.sphere, self.draws, self.mixing = (
            torch.Generator().manual_seed(derive(thief.seed, name)) for name in ("noise", "sphere", "replay", "mixing")
        )
        self.directions = torch.empty(0)
        self.kept: tuple[Tensor, npt.NDArray[np.float32]] | None = None
        self.kept_so_far = 0
        self.iterations = 0
        self.sums: dict[str, list[float]] = {}

    def probe(self) -> tuple[Tensor, Ask]:
        """Make a batch, and ask it together with itself moved along random directions.

        Returns:
            What pixels were made of, (N, C, H, W), with its graph, for ``move_generator``; and (m + 1) N images.
        """
        with self._working():
            painted = self._paint()
            shape = (self.game.directions, *painted.shape)
            directions = torch.randn(shape, generator=self.sphere)
            norms = directions.flatten(2).norm(dim=2).view(*shape[:2], 1, 1, 1)
            self.directions = (directions / norms).to(self.where)
            moved = painted.detach() + self.game.epsilon * self.directions
            images = pixels(torch.cat([painted.detach()[None], moved])).flatten(0, 1)
        return painted, self._ask(images)

    def move_generator(self, painted: Tensor, asked: Ask, answers: Answers) -> None:
        """Move the generator uphill on the disagreement, along the gradient that the answers of a probe give."""
        with self._working():
            self.student.eval()
            images = torch.from_numpy(np.ascontiguousarray(asked.images)).to(self.where)
            with torch.no_grad():
                values = self._disagreement(images, self._soften(answers)).view(-1, len(painted))
            estimate = forward_differences(values[0], values[1:], self.directions, self.game.epsilon)
            self._refuse_infinite({"disagreement": float(values.mean())})
            self._add("disagreement", float(values[0].mean()), len(painted))
            # Of the batch mean, and downhill on its negative.
            painted.backward(-estimate / len(painted))  # type: ignore[no-untyped-call]
            self._step("generator", self.generator)

    def batch(self) -> tuple[Tensor, Ask]:
        """Make a batch for the student: images, (N, C, H, W), and what asks them."""
        with self._working(), torch.no_grad():
            images = pixels(self._paint())
        return images, self._ask(images)

    def teach(self, images: Tensor, answers: Answers, *, fresh: bool = True) -> None:
        """Train the student on one answered batch; keep it for replay if it is ``fresh``.

        Raises:
            OnlineDiverged: The loss is not finite.
        """
        with self._working(), torch.random.fork_rng(devices.fork_devices(self.where)):
            # Dropout draws from the global stream.
            torch.manual_seed(derive(self.thief.seed, "dropout", self.updates))
            self.student.train()
            seen, targets = self.thief.learning.mix(images, self._soften(answers), self.mixing)
            loss = self._disagreement(seen, targets).mean()
            value = float(loss.detach())
            self._refuse_infinite({"student": value})
            loss.backward()  # type: ignore[no-untyped-call]
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
            self._step("student", self.student)
            self.updates += 1
            if not fresh:
                return
            self._add("student_loss", value, len(images))
            if self.game.replay_steps:
                self._keep(images, answers)

    def recall(self) -> tuple[Tensor, Answers]:
        """Draw a batch of what was kept for replay, with replacement."""
        assert self.kept is not None
        held = min(self.kept_so_far, self.game.replay_images)
        chosen = torch.randint(held, (self.game.batch_size,), generator=self.draws)
        return self.kept[0][chosen].to(self.where), self.kept[1][chosen.numpy()]

    def finish_iteration(self) -> None:
        """Log the means of the losses every so often."""
        self.iterations += 1
        if self.iterations % LOG_EVERY == 0:
            for name, (total, count) in self.sums.items():
                self.thief.log(name, total / count)
            self.sums = {}

    def _paint(self) -> Tensor:
        noise = torch.randn((self.game.batch_size, self.game.noise_size), generator=self.noise)
        painted: Tensor = self.generator(noise.to(self.where))
        return painted

    def _ask(self, images: Tensor) -> Ask:
        self._refuse_infinite({"images": float(images.sum())})
        return Ask(np.ascontiguousarray(images.cpu().numpy()), learn=False, whole=True)

    def _refuse_infinite(self, terms: dict[str, float]) -> None:
        if not all(map(math.isfinite, terms.values())):
            raise OnlineDiverged(self.iterations, self.updates, terms)

    def _soften(self, answers: Answers) -> Tensor:
        return self.thief.learning.soften(torch.from_numpy(np.ascontiguousarray(answers)).to(self.where))

    def _disagreement(self, images: Tensor, targets: Tensor) -> Tensor:
        learning = self.thief.learning
        scale = learning.heat**2 if learning.scale_by_temperature_squared else 1.0
        return scale * self.disagreement(self.student(images) / learning.heat, targets, learning.floor)

    def _optimiser(self, model: nn.Module, name: Optimizer, rate: float) -> torch.optim.Optimizer:
        decay = self.game.weight_decay if name == "sgd" else 0.0
        return make_optimizer(
            model, self.where, optimizer=name, learning_rate=rate, weight_decay=decay, momentum=MOMENTUM
        )

    def _step(self, name: str, model: nn.Module) -> None:
        start = getattr(self.game, f"{name}_learning_rate")
        for group in self.optimisers[name].param_groups:
            group["lr"] = start * self.game.rate(self.thief.asked)
        self.optimisers[name].step()
        model.zero_grad(set_to_none=True)

    def _keep(self, images: Tensor, answers: Answers) -> None:
        size = self.game.replay_images
        if self.kept is None:
            self.kept = torch.empty((size, *images.shape[1:])), np.empty((size, answers.shape[1]), np.float32)
        places = (self.kept_so_far + np.arange(len(images))) % size
        self.kept[0][torch.from_numpy(places)] = images.cpu()
        self.kept[1][places] = answers
        self.kept_so_far += len(images)

    def _add(self, name: str, value: float, count: int) -> None:
        total, so_far = self.sums.get(name, [0.0, 0])
        self.sums[name] = [total + value * count, so_far + count]

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Compute exactly, and count the time; never held while answers are waited for."""
        started = time.perf_counter()
        try:
            with devices.exact():
                yield
        finally:
            self.seconds += time.perf_counter() - started


class OnlineDiverged(TrainingDiverged):
    """A network of a data-free attack is no longer finite.

    Args:
        epoch: Iteration, from 0.
        step: Updates of the student before.
        terms: What was found not to be finite; empty for the student's weights.
    """

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.terms.items())
        return (
            f"a data-free attack diverged in iteration {self.epoch}, update {self.step} of the student "
            f"({values or 'its weights'} not finite); lower thief.attack.student_learning_rate or "
            "generator_learning_rate, or set thief.training.gradient_clip (e.g. 1.0)"
        )
