"""A victim, a substitute and attacks for tests of thieves: small, exact, and able to die at any query."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mea_ray.attacks.base import Attack, Rung
from mea_ray.attacks.learning import Learning
from mea_ray.attacks.query_attack import Thief
from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import LearningConfig, TrainingConfig, build
from mea_ray.core.errors import OverBudget
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.models.base import ImageModel

CLASSES, SHAPE = 4, (1, 8, 8)
POOL = np.random.default_rng(0).integers(0, 256, (600, *SHAPE), dtype=np.uint8)
FAST: dict[str, Any] = {"epochs": 2, "batch_size": 50, "augment": (), "schedule": "constant"}
FAST_TRAINING = TrainingConfig(**FAST)


class FakeBlackBox:
    """Answers by a known linear function and remembers what it was asked; can fail at a chosen query.

    As the real ones it charges a request by its place and content, so that one that is repeated after a kill is free:
    give the box of the next process the ``paid`` of the last, and ``start_at`` the answers that were kept.

    Args:
        budget: Images that are answered; None for any number.
        answer: ``all`` probabilities, the ``top_2``, or the ``label`` only.
        fail_at: The query, counted from 0, that raises before it is charged.
        paid: Requests that were charged in an earlier process.
        start_at: Images asked and kept in an earlier process.
        on_query: Called with the number of each query after it was charged and before it is answered.
    """

    classes, image_shape = CLASSES, SHAPE

    def __init__(
        self,
        budget: int | None = None,
        *,
        answer: str = "all",
        fail_at: int | None = None,
        paid: dict[tuple[int, str], int] | None = None,
        start_at: int = 0,
        on_query: Callable[[int], None] | None = None,
    ) -> None:
        self.budget, self.answer, self.fail_at, self.on_query = budget, answer, fail_at, on_query
        self.paid = dict(paid or {})
        self.start_at = start_at
        self.queries: list[Images | FloatImages] = []
        weights = np.random.default_rng(1).normal(0, 0.8, (CLASSES, 64))
        self.weights = weights - weights.mean(1, keepdims=True)

    @property
    def asked(self) -> int:
        return sum(map(len, self.queries))

    @property
    def charged(self) -> int:
        return sum(self.paid.values())

    @property
    def remaining(self) -> int | None:
        return None if self.budget is None else self.budget - self.charged

    def query(self, images: Images | FloatImages) -> Answers:
        assert isinstance(images, np.ndarray) and images.flags.c_contiguous and images.shape[1:] == SHAPE
        if self.fail_at is not None and len(self.queries) == self.fail_at:
            raise ConnectionError("the thief's process dies here")
        request = (self.start_at + self.asked, hashlib.sha256(images.tobytes()).hexdigest())
        if self.budget is not None and request not in self.paid and self.charged + len(images) > self.budget:
            raise OverBudget("thief", len(images), self.budget - self.charged, self.budget)
        self.paid[request] = len(images)
        if self.on_query is not None:
            self.on_query(len(self.queries))
        self.queries.append(images.copy())
        scaled = images.astype(np.float64) / 255 if images.dtype == np.uint8 else images.astype(np.float64)
        # No product of matrices: an answer must not depend on the other images of its query, not even in its last bit.
        logits = (scaled.reshape(len(images), 1, -1) * self.weights).sum(2)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        answers = powers / powers.sum(1, keepdims=True)
        if self.answer == "label":
            answers = np.eye(CLASSES)[answers.argmax(1)]
        if self.answer == "top_2":
            answers = np.where(answers >= np.sort(answers, 1)[:, -2:-1], answers, 0)
        given: Answers = answers.astype(np.float32)
        return given

    def distinct(self) -> int:
        return len(np.unique(np.concatenate(self.queries).reshape(self.asked, -1), axis=0))


class Substitute(ImageModel):
    """A linear network."""

    def __init__(self) -> None:
        super().__init__(SHAPE, CLASSES)
        self.feature_size, self.head = 64, nn.Linear(64, CLASSES)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def steal(
    blackbox: FakeBlackBox,
    budgets: Sequence[int],
    attack: Attack,
    *,
    pool: Images = POOL,
    training: dict[str, Any] = FAST,
    make_model: Callable[[], nn.Module] = Substitute,
    seed: int = 0,
    **rest: Any,
) -> list[Rung]:
    """Run an attack over its rungs."""
    if "learning" in rest:
        rest["learning"] = build(LearningConfig, rest["learning"])
    settings = build(TrainingConfig, training)
    return list(
        attack.run(blackbox, pool, budgets=budgets, make_model=make_model, training=settings, seed=seed, **rest)
    )


def thief_of(transfer: TransferSet, *, pool: Images = POOL, training: dict[str, Any] = FAST, seed: int = 0) -> Thief:
    """Return what an attack's queries see once everything in a transfer set is answered."""
    learning = Learning(temperature=1.0)
    thief = Thief(pool, None, CLASSES, SHAPE, transfer, learning, TrainingConfig(**training), seed, Substitute)
    thief.queries_spent = len(transfer)
    return thief


def same(a: nn.Module, b: nn.Module) -> bool:
    """Tell whether two networks have the same bits."""
    others = b.state_dict()
    return all(torch.equal(value, others[name]) for name, value in a.state_dict().items())


def flat(queries: Sequence[Images | FloatImages]) -> list[bytes]:
    """List the images of some queries by their bytes, in order."""
    return [image.tobytes() for query in queries for image in query]
