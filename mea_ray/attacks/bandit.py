"""The gradient bandit over the classes of a thief's pool, flat or in two levels, for Knockoff's adaptive policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mea_ray.core.types import Images, Labels

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

CLASS_SAMPLE = 200
"""Most images that the description of a class is computed from, evenly spaced over the class."""
CELLS = 8
"""Cells along each side of the grid on which a class is described."""


class Bandit:
    """A softmax policy over arms, trained by gradient ascent on the expected reward. Arms can be removed.

    Args:
        arms: Number of arms, at least 1.

    Attributes:
        preferences: H, float64 (arms,); all 0 at first, a uniform policy.
        drawn: How often each arm was rewarded, N(z), int64 (arms,).
        alive: Arms that can still be drawn, bool (arms,).

    References:
        Sutton and Barto, Reinforcement Learning, 2nd ed., section 2.8; Orekondy et al., Knockoff Nets, 2019, section 5.
    """

    def __init__(self, arms: int) -> None:
        self.preferences: Floats = np.zeros(arms)
        self.drawn: Indices = np.zeros(arms, np.int64)
        self.alive = np.ones(arms, bool)

    def probabilities(self) -> Floats:
        """Return softmax(H) over the remaining arms, float64 (arms,); 0 for all others."""
        powers = np.zeros(len(self.alive))
        if self.alive.any():
            left = self.preferences[self.alive]
            # Only differences count, and the largest exponent is 0: nothing overflows, however large H is.
            powers[self.alive] = np.exp(left - left.max())
            powers /= powers.sum()
        return powers

    def update(self, arm: int, advantage: float, probabilities: Floats) -> None:
        """Move H by a reward: H_z += a (1 - pi_z), and H_z' -= a pi_z' for all others, with a = advantage / N(z).

        Args:
            arm: The arm z that was drawn.
            advantage: Its reward less the baseline.
            probabilities: The policy that it was drawn from. Arms removed by then have probability 0 and do not move.
        """
        self.drawn[arm] += 1
        step = advantage / float(self.drawn[arm])
        self.preferences -= step * probabilities
        self.preferences[arm] += step


@dataclass(frozen=True)
class Draw:
    """One class drawn.

    Attributes:
        action: The class, a position among those of the pool.
        coarse: Probabilities of the groups when it was drawn.
        fine: Probabilities of the classes of its group.
    """

    action: int
    coarse: Floats
    fine: Floats


class ClassPolicy:
    """Draws classes in two levels: a group of classes by one bandit, then a class of the group by the group's own.

    The flat policy has a single group. A class without images left is removed from its group's bandit, a group without
    classes left from the coarse one.

    Args:
        supply: Images of each class, int64 (classes,), each at least 1.
        groups: Positions of the classes of each group: disjoint, none empty, together all classes.
    """

    def __init__(self, supply: npt.NDArray[np.integer], groups: Sequence[Indices]) -> None:
        self.supply = np.array(supply, np.int64)
        self.groups = [np.asarray(group, np.int64) for group in groups]
        self.coarse = Bandit(len(groups))
        self.fine = [Bandit(len(group)) for group in groups]
        # For each class: its group, and its position in the group.
        self.place = {
            int(action): (number, position)
            for number, group in enumerate(self.groups)
            for position, action in enumerate(group)
        }

    def probabilities(self) -> Floats:
        """Return the probability of each class to be drawn next, float64 (classes,): pi(group) pi(class | group)."""
        everything = np.zeros(len(self.supply))
        for group, share, bandit in zip(self.groups, self.coarse.probabilities(), self.fine, strict=True):
            everything[group] = share * bandit.probabilities()
        return everything

    def draw(self, uniform: npt.NDArray[np.floating], action: int | None = None) -> Draw:
        """Draw a class and remove one image of it from the supply.

        Args:
            uniform: Two random numbers in [0, 1): one for the group, one for the class.
            action: A class that was drawn here before an interruption, to be drawn again; None draws by ``uniform``.
        """
        coarse = self.coarse.probabilities()
        if action is None:
            number = _inverse(coarse, float(uniform[0]))
            fine = self.fine[number].probabilities()
            position = _inverse(fine, float(uniform[1]))
        else:
            number, position = self.place[action]
            fine = self.fine[number].probabilities()
        drawn = Draw(int(self.groups[number][position]), coarse, fine)
        self.supply[drawn.action] -= 1
        if not self.supply[drawn.action]:
            self.fine[number].alive[position] = False
            self.coarse.alive[number] = self.fine[number].alive.any()
        return drawn

    def update(self, draw: Draw, advantage: float) -> None:
        """Move both levels by the advantage of a draw, each by its own count of draws."""
        number, position = self.place[draw.action]
        self.coarse.update(number, advantage, draw.coarse)
        self.fine[number].update(position, advantage, draw.fine)


def _inverse(probabilities: Floats, uniform: float) -> int:
    """Draw an arm: the first whose cumulated probability exceeds ``uniform``; never one of probability 0."""
    cumulated = probabilities.cumsum()
    # The last sum may be a rounding error below 1, so scale by it.
    return int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))


def group_classes(pool: Images, members: Sequence[Indices], groups: int) -> list[Indices]:
    """Group classes that look alike, by the pool's pixels alone: no network, no query, no random number.

    A class is described by the mean and the standard deviation, over its images, of the image shrunk to 8 x 8 cells:
    its average look, and how much its images differ (noise of any kind has the same mean, a uniform grey). Classes are
    merged by Ward's method until ``groups`` are left.

    Args:
        pool: uint8 (N, C, H, W).
        members: Positions in the pool of the images of each class, none empty.
        groups: Number of groups, at least 1; with more than there are classes, each class is a group of its own.

    Returns:
        Positions of the classes of each group, rising; groups in the order of their first classes.

    References:
        Ward, Hierarchical Grouping to Optimize an Objective Function, 1963. Orekondy et al. take ImageNet's own
        hierarchy, which other pools lack.
    """
    count = min(groups, len(members))
    if count == len(members):
        return [np.array([action]) for action in range(count)]
    if count == 1:
        return [np.arange(len(members))]
    from sklearn.cluster import AgglomerativeClustering  # imported late: it takes a second

    descriptions = np.stack([_describe(pool, indices) for indices in members])
    labels = AgglomerativeClustering(n_clusters=count, linkage="ward").fit_predict(descriptions)
    first_seen = list(dict.fromkeys(labels.tolist()))
    return [np.flatnonzero(labels == label) for label in first_seen]


def _describe(pool: Images, indices: Indices) -> Floats:
    chosen = indices[np.linspace(0, len(indices) - 1, min(len(indices), CLASS_SAMPLE)).round().astype(np.int64)]
    shrunk = _shrink(pool[chosen].astype(np.float64) / 255)
    return np.concatenate([shrunk.mean(0).ravel(), shrunk.std(0).ravel()])


def _shrink(images: Floats) -> Floats:
    """Average images over a grid of at most 8 x 8 cells with borders at whole pixels."""
    for axis in (2, 3):
        side = images.shape[axis]
        cells = min(CELLS, side)
        borders = np.arange(cells + 1) * side // cells
        sums = np.add.reduceat(images, borders[:-1], axis=axis)
        widths = np.diff(borders).astype(np.float64)
        images = sums / (widths[:, None] if axis == 2 else widths)
    return images


def members_of(labels: Labels) -> tuple[Labels, list[Indices]]:
    """Return the labels that occur, rising, and the positions of the images of each."""
    present, inverse = np.unique(labels, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    return present, np.split(order, np.cumsum(np.bincount(inverse))[:-1])
