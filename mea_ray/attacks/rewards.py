"""Rewards of Knockoff's adaptive policy: what an answer was worth, on one scale for all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from mea_ray.core.types import Answers

Kind = Literal["certainty", "diversity", "loss"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FLOOR = 1e-7
"""Least probability that a student is taken to give a class, so that the loss stays finite."""


class Rewards:
    """Rates answers one after another, each by those before it.

    Answers are used as the API gives them: probabilities stay probabilities (no second softmax), and none is turned
    into a label. What the API hides (all but the first k) counts as 0.

    - certainty: the largest probability less the second largest, in [0, 1].
    - diversity: sum over the classes of max(0, p_k - m_k), in [0, 1], where m is the mean of all answers before this
      one: high for classes that the victim said rarely so far. The first answer has nothing to differ from: 0.
    - loss: cross-entropy of the student's prediction with the victim's answer: high where the student is wrong.

    Each kind is rescaled to [0, 1] by the least and the largest value of its kind so far, its own included; as long as
    all were equal it is 0.5. One reward is the mean of the kinds in use.

    Args:
        kinds: Kinds in use.
        classes: Number of classes in an answer.

    References:
        Orekondy et al., Knockoff Nets, 2019, https://arxiv.org/abs/1812.02766, section 5.
    """

    def __init__(self, kinds: Sequence[Kind], classes: int) -> None:
        self.kinds = tuple(kinds)
        self.rated = 0
        self.mean_answer = np.zeros(classes)
        self.mean_reward = 0.0
        self.low = dict.fromkeys(self.kinds, np.inf)
        self.high = dict.fromkeys(self.kinds, -np.inf)

    def rate(self, answer: Answers, said: Answers | None) -> tuple[float, float, dict[Kind, float]]:
        """Rate an answer.

        Args:
            answer: The victim's, float32 (classes,).
            said: The student's prediction for the same image, float32 (classes,); read by ``loss`` only.

        Returns:
            The reward in [0, 1]; the same less the baseline, which is the mean of all rewards before it (for the first:
            itself); and the plain values of the kinds.
        """
        p = answer.astype(np.float64)
        plain = {kind: self._plain(kind, p, said) for kind in self.kinds}
        reward = float(np.mean([self._rescale(kind, value) for kind, value in plain.items()]))
        advantage = reward - self.mean_reward if self.rated else 0.0
        self.rated += 1
        self.mean_answer += (p - self.mean_answer) / self.rated
        self.mean_reward += (reward - self.mean_reward) / self.rated
        return reward, advantage, plain

    def _plain(self, kind: Kind, p: np.ndarray, said: Answers | None) -> float:
        if kind == "certainty":
            second, first = np.partition(p, -2)[-2:]
            return float(first - second)
        if kind == "diversity":
            return float(np.maximum(0, p - self.mean_answer).sum()) if self.rated else 0.0
        assert said is not None  # who uses this kind trains a student
        return float(-(p * np.log(np.maximum(said.astype(np.float64), FLOOR))).sum())

    def _rescale(self, kind: Kind, value: float) -> float:
        low = self.low[kind] = min(self.low[kind], value)
        high = self.high[kind] = max(self.high[kind], value)
        return (value - low) / (high - low) if high > low else 0.5
