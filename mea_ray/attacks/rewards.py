"""Rewards of Knockoff's adaptive policy: what an answer was worth, on one scale for all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from mea_ray.core.types import Answers

RewardKind = Literal["certainty", "diversity", "loss"]
REWARD_KINDS: tuple[RewardKind, ...] = get_args(RewardKind)

FLOOR = 1e-7
"""Smallest probability that a student is assumed to give a class, so that the loss stays finite."""


class Rewards:
    """Scores answers one after another, each relative to those before it.

    Answers are used as the API returns them: probabilities stay probabilities (no second softmax), and none is turned
    into a label. What the API hides (all but the first k) counts as 0.

    - certainty: the largest probability less the second largest, in [0, 1].
    - diversity: sum over the classes of max(0, p_k - m_k), in [0, 1], where m is the mean of all answers before this
      one: high for classes that the victim rarely predicted so far. The first answer has nothing to differ from: 0.
    - loss: cross-entropy of the student's prediction with the victim's answer: high where the student is wrong.

    Each kind is rescaled to [0, 1] by its smallest and its largest value so far, the new one included. While all values
    are equal it is 0.5. A reward is the mean of the kinds in use.

    Args:
        kinds: Kinds in use.
        classes: Number of classes in an answer.

    References:
        Orekondy et al., Knockoff Nets, 2019, https://arxiv.org/abs/1812.02766, section 5.
    """

    def __init__(self, kinds: Sequence[RewardKind], classes: int) -> None:
        self.kinds = tuple(kinds)
        self.scored = 0
        self.mean_answer = np.zeros(classes)
        self.mean_reward = 0.0
        self.low = dict.fromkeys(self.kinds, np.inf)
        self.high = dict.fromkeys(self.kinds, -np.inf)

    def score(
        self, answer: Answers, prediction: npt.NDArray[np.float32] | None
    ) -> tuple[float, float, dict[RewardKind, float]]:
        """Score an answer.

        Args:
            answer: The victim's, float32 (classes,).
            prediction: The student's for the same image, float32 (classes,); only ``loss`` reads it.

        Returns:
            The reward in [0, 1]; the advantage, which is the reward less the baseline, the mean of all rewards before
            (0 for the first); and the values of the kinds before rescaling.
        """
        p = answer.astype(np.float64)
        values = {kind: self._value(kind, p, prediction) for kind in self.kinds}
        reward = float(np.mean([self._rescale(kind, value) for kind, value in values.items()]))
        advantage = reward - self.mean_reward if self.scored else 0.0
        self.scored += 1
        self.mean_answer += (p - self.mean_answer) / self.scored
        self.mean_reward += (reward - self.mean_reward) / self.scored
        return reward, advantage, values

    def _value(self, kind: RewardKind, p: npt.NDArray[np.float64], prediction: npt.NDArray[np.float32] | None) -> float:
        if kind == "certainty":
            second, first = np.partition(p, -2)[-2:]
            return float(first - second)
        if kind == "diversity":
            return float(np.maximum(0, p - self.mean_answer).sum()) if self.scored else 0.0
        assert prediction is not None  # this kind is only used with a student
        return float(-(p * np.log(np.maximum(prediction.astype(np.float64), FLOOR))).sum())

    def _rescale(self, kind: RewardKind, value: float) -> float:
        low = self.low[kind] = min(self.low[kind], value)
        high = self.high[kind] = max(self.high[kind], value)
        return (value - low) / (high - low) if high > low else 0.5
