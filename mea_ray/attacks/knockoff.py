"""Knockoff Nets: substitutes from the answers to a pool, asked at random or by a policy that learns what pays."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import nn

from mea_ray.attacks.bandit import Draw, Indices, Policy, group_classes, members_of
from mea_ray.attacks.driver import Queries, Thief, TransferAttack
from mea_ray.attacks.rewards import KINDS, Kind, Rewards
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers
from mea_ray.evaluation import metrics
from mea_ray.training.device import device

Choice = Literal["random", "adaptive"]
Reward = Literal["all", "certainty", "diversity", "loss"]
Hierarchy = Literal["none", "two_level"]

LOGGED_CLASSES = 20
"""Classes, and groups, whose probabilities are logged at most: the first ones."""
LOG_GROWTH = 1.06
"""A curve gets its next point after one batch more, or after this many times the queries of the last one."""


class Knockoff(TransferAttack):
    """Ask the images of a pool, without replacement, and train substitutes on the answers (soft cross-entropy).

    ``random`` asks them in a random order: the same as ``distillation`` asks from the same seed. ``adaptive`` needs a
    pool with labels and learns a policy over its classes: it draws a class from softmax(H), asks an image of the class
    that it has not asked before, and moves H by what the answer was worth, with the step 1 / N(class). The baseline is
    the mean of the rewards so far; a class without images left leaves the policy.

    The curves: ``reward`` (after rescaling) and ``reward/<kind>`` (before), each the mean since the point before;
    ``policy/<label>``, the probability of a class to be drawn next (the first 20), and ``policy/group/<n>`` that of a
    group, with ``policy/group_of/<label>`` for who is in it. Points lie ever farther apart, below 200 of them up to a
    million queries.

    Args:
        policy: random or adaptive.
        reward: Of the adaptive policy: certainty (the victim is sure), diversity (it says what it rarely said), loss
            (the student does not know it), or all, their mean.
        hierarchy: none is one policy over all classes. two_level draws a group of classes, then a class of the group;
            groups are of classes whose images look alike (see ``attacks.bandit.group_classes``).
        coarse_classes: Groups of two_level; null is the square root of the number of classes, rounded. More than there
            are classes are as many.
        batch: Images drawn from one state of the policy, and asked in one query. 1 is the paper. More is faster, and
            late: the images of a batch are drawn before the answers to the others are known, and rewarded afterwards,
            one by one, with the probabilities that they were drawn from.
        student_every: Of the loss reward: images between two fits of the student, at least; a tenth of those asked so
            far, if that is more. Before the first fit the student is the untrained network.
        student_epochs: Epochs of a fit; it goes on from the weights of the last one, at a constant learning rate.
        student_images: Images of a fit at most, drawn anew from all that were asked.

    References:
        Orekondy et al., Knockoff Nets: Stealing Functionality of Black-Box Models, CVPR 2019,
        https://arxiv.org/abs/1812.02766.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(
        self,
        *,
        policy: Choice = "random",
        reward: Reward = "all",
        hierarchy: Hierarchy = "none",
        coarse_classes: int | None = None,
        batch: int = 16,
        student_every: int = 100,
        student_epochs: int = 3,
        student_images: int = 4096,
    ) -> None:
        for name, value, known in (
            ("policy", policy, get_args(Choice)),
            ("reward", reward, get_args(Reward)),
            ("hierarchy", hierarchy, get_args(Hierarchy)),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(known)}")
        if coarse_classes is not None and coarse_classes < 2:
            raise ConfigError(f"coarse_classes={coarse_classes} must be at least 2, or null to choose by the pool")
        for name, number, least in (
            ("batch", batch, 1),
            ("student_every", student_every, 2),
            ("student_epochs", student_epochs, 1),
            ("student_images", student_images, 2),
        ):
            if number < least:
                raise ConfigError(f"{name}={number} must be at least {least}")
        self.adaptive, self.two_level, self.coarse_classes = (
            policy == "adaptive",
            hierarchy == "two_level",
            coarse_classes,
        )
        self.kinds: tuple[Kind, ...] = KINDS if reward == "all" else (reward,)
        self.batch = batch
        self.student_every, self.student_epochs, self.student_images = student_every, student_epochs, student_images
        self.uses_labels = self.adaptive

    def queries(self, thief: Thief) -> Queries:
        """Ask the pool until it is empty."""
        return self._adaptive(thief) if self.adaptive else thief.pool_in_order(self.query_chunk)

    def _adaptive(self, thief: Thief) -> Queries:
        assert thief.labels is not None
        present, members = members_of(thief.labels)
        groups = self._groups(thief, members)
        policy = Policy(np.array([len(each) for each in members]), groups)
        rewards = Rewards(self.kinds, thief.classes)
        student = _Student(self, thief) if "loss" in self.kinds else None
        log = _Log(thief, present, policy, named=self.two_level)
        shuffle = numpy_generator(thief.seed, "queries")
        stacks = [list(shuffle.permutation(each)[::-1]) for each in members]
        chance = numpy_generator(thief.seed, "policy")
        while policy.supply.any():
            # Two random numbers for each image, whether they are needed or not: the stream keeps its place.
            uniform = chance.random((min(self.batch, int(policy.supply.sum())), 2))
            draws = _draw(policy, uniform, _kept_classes(thief, present, len(uniform)))
            indices = np.array([stacks[draw.action].pop() for draw in draws], np.int64)
            answers = yield thief.from_pool(indices)
            said = student.predict(indices) if student is not None else None
            for position, draw in enumerate(draws):
                reward, advantage, plain = rewards.rate(answers[position], said[position] if said is not None else None)
                policy.update(draw, advantage)
                log.note(reward, plain)
            log.write()
            if student is not None:
                student.learn(indices, answers)

    def _groups(self, thief: Thief, members: list[Indices]) -> list[Indices]:
        if not self.two_level:
            return [np.arange(len(members))]
        wanted = self.coarse_classes if self.coarse_classes is not None else round(len(members) ** 0.5)
        return group_classes(thief.pool, members, wanted)


def _draw(policy: Policy, uniform: npt.NDArray[np.float64], kept: list[int]) -> list[Draw]:
    draws: list[Draw] = []
    for position, numbers in enumerate(uniform):
        known = kept[position] if position < len(kept) else None
        # A transfer set of another attack may name a class that is empty here; the driver then refuses the set.
        draws.append(policy.draw(numbers, known if known is not None and policy.supply[known] else None))
    return draws


def _kept_classes(thief: Thief, present: npt.NDArray[np.int64], count: int) -> list[int]:
    """Return the next ``count`` classes that an interrupted run drew, as far as its answers were kept; usually none.

    They follow from the seed and from the answers, so that drawing again gives the same, unless the student was trained
    where sums are not reproducible to the last bit (another machine, another GPU). Then what was paid for counts.
    """
    assert thief.labels is not None
    if len(thief.transfer) <= thief.asked:
        return []
    names = thief.transfer.indices[thief.asked : thief.asked + count]
    if not ((names >= 0) & (names < len(thief.labels))).all():
        return []
    kept: list[int] = np.searchsorted(present, thief.labels[names]).tolist()
    return kept


class _Student:
    """The network that the loss reward compares with: trained now and then on what was asked so far."""

    def __init__(self, attack: Knockoff, thief: Thief) -> None:
        self.attack, self.thief = attack, thief
        self.model: nn.Module = thief.new_model("student").to(device())
        self.indices: list[Indices] = []
        self.answers: list[Answers] = []
        self.fits = self.asked = self.due = 0
        self._postpone()

    def predict(self, indices: Indices) -> Answers:
        """Return its probabilities for images of the pool, float32 (N, classes)."""
        return metrics.probabilities(self.model, self.thief.pool[indices])

    def learn(self, indices: Indices, answers: Answers) -> None:
        """Take notice of answers; train when it is time."""
        self.indices.append(indices)
        self.answers.append(answers)
        self.asked += len(indices)
        if self.asked < self.due:
            return
        self.fits += 1
        # Joined each time, all answers so far cost no more than the fit itself.
        known, targets = np.concatenate(self.indices), np.concatenate(self.answers)
        chosen = np.arange(len(known))
        if len(known) > self.attack.student_images:
            generator = numpy_generator(self.thief.seed, "student", "images", self.fits)
            chosen = np.sort(generator.choice(len(known), self.attack.student_images, replace=False))
        self.thief.fit(
            self.model,
            self.thief.pool[known[chosen]],
            targets[chosen],
            "student",
            self.fits,
            epochs=self.attack.student_epochs,
            schedule="constant",
        )
        # It comes back on the CPU; kept where it will predict, it does not travel for every batch.
        self.model.to(device())
        self._postpone()

    def _postpone(self) -> None:
        self.due = self.asked + max(self.attack.student_every, self.asked // 10)


class _Log:
    """Curves of the rewards and of the policy, at queries that depend on nothing but their number."""

    def __init__(self, thief: Thief, present: npt.NDArray[np.int64], policy: Policy, *, named: bool) -> None:
        self.thief, self.policy, self.named = thief, policy, named
        self.labels = [int(label) for label in present[:LOGGED_CLASSES]]
        self.rewards: list[float] = []
        self.plain: dict[str, list[float]] = {}
        self.next = 0.0
        if named:
            for label, action in zip(self.labels, range(len(self.labels)), strict=True):
                thief.log(f"policy/group_of/{label}", policy.place[action][0])
        self._policy()

    def note(self, reward: float, plain: dict[Kind, float]) -> None:
        """Remember a reward until the next point."""
        self.rewards.append(reward)
        for kind, value in plain.items():
            self.plain.setdefault(kind, []).append(value)

    def write(self) -> None:
        """Add a point to each curve, if it is time."""
        if self.thief.asked < self.next:
            return
        self.thief.log("reward", float(np.mean(self.rewards)))
        for kind, values in self.plain.items():
            self.thief.log(f"reward/{kind}", float(np.mean(values)))
        self._policy()
        self.rewards, self.plain = [], {}
        self.next = self.thief.asked * LOG_GROWTH

    def _policy(self) -> None:
        probabilities = self.policy.probabilities()
        for action, label in enumerate(self.labels):
            self.thief.log(f"policy/{label}", float(probabilities[action]))
        if self.named:
            for number, share in enumerate(self.policy.coarse.probabilities()[:LOGGED_CLASSES]):
                self.thief.log(f"policy/group/{number}", float(share))
