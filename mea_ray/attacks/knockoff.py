"""Knockoff Nets: a pool is queried at random, or by a policy over its classes that learns from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn

from mea_ray.attacks.bandit import ClassPolicy, Draw, Indices, group_classes, members_of
from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief
from mea_ray.attacks.rewards import REWARD_KINDS, RewardKind, Rewards
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers
from mea_ray.evaluation import metrics
from mea_ray.training.device import device

PolicyName = Literal["random", "adaptive"]
RewardName = Literal["all", "certainty", "diversity", "loss"]
Hierarchy = Literal["none", "two_level"]

LOGGED_CLASSES = 20
"""Most classes, and most groups, whose probabilities are logged: the first ones."""
LOG_GROWTH = 1.06
"""A curve gets its next point once the queries have grown by this factor, and by a batch at least."""


class Knockoff(QueryAttack):
    """Query the images of a pool, without replacement, and train substitutes on the answers (soft cross-entropy).

    Choose it for a thief with a large pool of images of other classes.

    ``random`` queries them in a random order, the same as ``distillation`` with the same seed. ``adaptive`` needs a
    pool with labels and learns a policy over its classes. It draws a class from softmax(H), queries a new image of that
    class, and moves H by the reward of the answer, with the step 1 / N(class). The baseline is the mean of the rewards
    so far. A class without images left is removed from the policy.

    Curves: ``reward`` (after rescaling) and ``reward/<kind>`` (before), each the mean since the last point;
    ``policy/<label>``, the probability that a class is drawn next (the first 20); ``policy/group/<n>``, that of a
    group; and ``policy/group_of/<label>``, the group of a class. Their spacing grows: fewer than 200 points up
    to a million queries.

    Args:
        policy: random or adaptive.
        reward: Of the adaptive policy: certainty (the victim is sure), diversity (it predicts a rare class), loss (the
            student is wrong), or all, their mean.
        hierarchy: none is one policy over all classes. two_level draws a group of classes, then a class of the group;
            groups are of classes whose images look alike (see ``attacks.bandit.group_classes``).
        coarse_classes: Groups of two_level, at most one for each class; null is the rounded square root of the number
            of classes.
        batch: Images drawn from one state of the policy, and sent in one query. 1 is the paper. More is faster, but
            delayed: the images of a batch are drawn before the answers to the others are known, and rewarded
            afterwards, one by one, with the probabilities that they were drawn from.
        student_every: For the loss reward: fewest images between two fits of the student, or a tenth of the images
            queried so far, if that is more. Before the first fit the student is an untrained network.
        student_epochs: Epochs of a fit, which continues from the last fit's weights at a constant learning rate.
        student_images: Most images of a fit, drawn anew from all queried images.

    References:
        Orekondy et al., Knockoff Nets: Stealing Functionality of Black-Box Models, CVPR 2019,
        https://arxiv.org/abs/1812.02766.
    """

    def __init__(
        self,
        *,
        policy: PolicyName = "random",
        reward: RewardName = "all",
        hierarchy: Hierarchy = "none",
        coarse_classes: Annotated[int, Field(ge=2)] | None = None,
        batch: Annotated[int, Field(ge=1)] = 16,
        student_every: Annotated[int, Field(ge=2)] = 100,
        student_epochs: Annotated[int, Field(ge=1)] = 3,
        student_images: Annotated[int, Field(ge=2)] = 4096,
    ) -> None:
        self.adaptive = self.uses_labels = policy == "adaptive"
        self.two_level, self.coarse_classes = hierarchy == "two_level", coarse_classes
        self.kinds: tuple[RewardKind, ...] = REWARD_KINDS if reward == "all" else (reward,)
        self.batch = batch
        self.student_every, self.student_epochs, self.student_images = student_every, student_epochs, student_images

    def queries(self, thief: Thief) -> Queries:
        """Query the pool until it is exhausted."""
        return self._adaptive(thief) if self.adaptive else thief.query_pool(self.query_chunk)

    def _adaptive(self, thief: Thief) -> Queries:
        assert thief.labels is not None
        present, members = members_of(thief.labels)
        groups = self._groups(thief, members)
        policy = ClassPolicy(np.array([len(each) for each in members]), groups)
        rewards = Rewards(self.kinds, thief.classes)
        student = _Student(self, thief) if "loss" in self.kinds else None
        log = _Curves(thief, present, policy, grouped=self.two_level)
        shuffle = numpy_generator(thief.seed, "queries")
        stacks = [list(shuffle.permutation(each)[::-1]) for each in members]
        chance = numpy_generator(thief.seed, "policy")
        while policy.supply.any():
            # Two random numbers for each image, used or not, so that the stream does not depend on the draws.
            uniform = chance.random((min(self.batch, int(policy.supply.sum())), 2))
            draws = _draw(policy, uniform, _stored_classes(thief, present, len(uniform)))
            indices = np.array([stacks[draw.action].pop() for draw in draws], np.int64)
            answers = yield indices
            predictions = student.predict(indices) if student is not None else None
            for position, draw in enumerate(draws):
                prediction = predictions[position] if predictions is not None else None
                reward, advantage, values = rewards.score(answers[position], prediction)
                policy.update(draw, advantage)
                log.add(reward, values)
            log.write()
            if student is not None:
                student.learn(indices, answers)

    def _groups(self, thief: Thief, members: list[Indices]) -> list[Indices]:
        if not self.two_level:
            return [np.arange(len(members))]
        wanted = self.coarse_classes if self.coarse_classes is not None else round(len(members) ** 0.5)
        return group_classes(thief.pool, members, wanted)


def _draw(policy: ClassPolicy, uniform: npt.NDArray[np.float64], stored: Sequence[int]) -> list[Draw]:
    draws: list[Draw] = []
    for position, numbers in enumerate(uniform):
        known = stored[position] if position < len(stored) else None
        # The transfer set of another attack may name a class that is empty here; it is then refused as foreign.
        draws.append(policy.draw(numbers, known if known is not None and policy.supply[known] else None))
    return draws


def _stored_classes(thief: Thief, present: npt.NDArray[np.int64], count: int) -> list[int]:
    """Return the next classes, ``count`` at most, that an interrupted run drew, if its answers are stored.

    They follow from the seed and from the answers, so drawing again gives the same. The exception is a student trained
    where sums differ in their last bits (another machine, another GPU). Then the draws that were paid for count.
    """
    assert thief.labels is not None
    if len(thief.transfer) <= thief.queries_spent:
        return []
    names = thief.transfer.indices[thief.queries_spent : thief.queries_spent + count]
    if not ((names >= 0) & (names < len(thief.labels))).all():
        return []
    classes: list[int] = np.searchsorted(present, thief.labels[names]).tolist()
    return classes


class _Student:
    """The network of the loss reward, trained now and then on the queries so far."""

    def __init__(self, attack: Knockoff, thief: Thief) -> None:
        self.attack, self.thief = attack, thief
        self.model: nn.Module = thief.new_model("student").to(device())
        self.indices: list[Indices] = []
        self.answers: list[Answers] = []
        self.fits = self.queried = self.due = 0
        self._postpone()

    def predict(self, indices: Indices) -> Answers:
        """Return its probabilities for images of the pool, float32 (N, classes)."""
        return metrics.probabilities(self.model, self.thief.pool[indices])

    def learn(self, indices: Indices, answers: Answers) -> None:
        """Add answers; train when a fit is due."""
        self.indices.append(indices)
        self.answers.append(answers)
        self.queried += len(indices)
        if self.queried < self.due:
            return
        self.fits += 1
        # Joining all answers so far costs no more than the fit itself.
        indices, targets = np.concatenate(self.indices), np.concatenate(self.answers)
        chosen = np.arange(len(indices))
        if len(indices) > self.attack.student_images:
            generator = numpy_generator(self.thief.seed, "student", "images", self.fits)
            chosen = np.sort(generator.choice(len(indices), self.attack.student_images, replace=False))
        self.thief.fit(
            self.model,
            self.thief.pool[indices[chosen]],
            targets[chosen],
            "student",
            self.fits,
            resumes=False,
            epochs=self.attack.student_epochs,
            schedule="constant",
        )
        # Training leaves it on the CPU; moved once here, it does not travel for every batch.
        self.model.to(device())
        self._postpone()

    def _postpone(self) -> None:
        self.due = self.queried + max(self.attack.student_every, self.queried // 10)


class _Curves:
    """Curves of the rewards and of the policy, with points at the same queries in every run."""

    def __init__(self, thief: Thief, present: npt.NDArray[np.int64], policy: ClassPolicy, *, grouped: bool) -> None:
        self.thief, self.policy, self.grouped = thief, policy, grouped
        self.labels = [int(label) for label in present[:LOGGED_CLASSES]]
        self.rewards: list[float] = []
        self.values: dict[str, list[float]] = {}
        self.next = 0.0
        if grouped:
            for label, action in zip(self.labels, range(len(self.labels)), strict=True):
                thief.log(f"policy/group_of/{label}", policy.place[action][0])
        self._policy()

    def add(self, reward: float, values: dict[RewardKind, float]) -> None:
        """Add a reward to the next point."""
        self.rewards.append(reward)
        for kind, value in values.items():
            self.values.setdefault(kind, []).append(value)

    def write(self) -> None:
        """Add a point to each curve, if one is due."""
        if self.thief.queries_spent < self.next:
            return
        self.thief.log("reward", float(np.mean(self.rewards)))
        for kind, values in self.values.items():
            self.thief.log(f"reward/{kind}", float(np.mean(values)))
        self._policy()
        self.rewards, self.values = [], {}
        self.next = self.thief.queries_spent * LOG_GROWTH

    def _policy(self) -> None:
        probabilities = self.policy.probabilities()
        for action, label in enumerate(self.labels):
            self.thief.log(f"policy/{label}", float(probabilities[action]))
        if self.grouped:
            for number, share in enumerate(self.policy.coarse.probabilities()[:LOGGED_CLASSES]):
                self.thief.log(f"policy/group/{number}", float(share))
