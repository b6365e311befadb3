"""Extraction by Jacobian-based dataset augmentation: steps from queried images along a substitute's gradient."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief
from mea_ray.attacks.transfer import content_names
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers, Images, Labels
from mea_ray.training import device as devices
from mea_ray.training.augment import to_float

Output = Literal["probability", "logit"]
Count = Annotated[int, Field(ge=1)]


class Jbda(QueryAttack):
    """Query a seed set, then steps from every queried image along the sign of a fresh substitute's gradient.

    Choose it for a thief with few images of his own.

    A round trains a substitute from new weights on all answers so far. From each queried image x it makes the image
    ``clip(x + step * sign(dF_c(x) / dx))``, where c is the class that the victim gave to x (never a label of the
    thief's own). Images that are new are queried, and the next round starts from all. A set of n images grows to 2n at
    most, so rounds follow each other until the budget is spent; it cuts the last one.

    An API takes pictures, whose pixels have 256 levels. So ``step`` is rounded to whole levels, and made images are
    uint8, clipped to 0..255: victim and substitute see the same image, and equal images are recognised.

    A round whose steps are all known already (because of clipping, or a gradient of zero) adds ``seed_size`` new images
    of the pool instead. When the pool is exhausted the attack ends, and later rungs hold fewer queries than their
    budget.

    Args:
        seed_size: Images of the pool that are queried first, whatever the budget.
        step: Length of a step in each pixel, in units of [0, 1], rounded to whole levels of 1/255 (0.1 is 26 of
            them): lambda of the paper.
        rounds_epochs: Epochs that the substitute of a round is trained; null takes those of ``thief.training``.
        output: What is differentiated: the substitute's ``probability`` of the class, or its ``logit``. The paper's F
            is a network that ends with a softmax.
        periodic: The step changes its sign after this many rounds (tau); null never.
        reservoir: Images that a round steps from, drawn uniformly from all queried ones (kappa); null takes all.
        reservoir_from: Rounds before the first one that is limited by ``reservoir`` (sigma).
        query_chunk: Images in a query; the answers of one are on the disk before the next is sent.

    References:
        Papernot et al., Practical Black-Box Attacks against Machine Learning, 2017, https://arxiv.org/abs/1602.02697,
        algorithm 1. Periodic steps and the reservoir: Papernot et al., Transferability in Machine Learning, 2016,
        https://arxiv.org/abs/1605.07277, whose reservoir sampling draws a uniform subset, as here.
    """

    def __init__(
        self,
        *,
        seed_size: Count = 150,
        step: Annotated[float, Field(ge=1 / 255, le=1)] = 0.1,
        rounds_epochs: Count | None = None,
        output: Output = "probability",
        periodic: Count | None = None,
        reservoir: Count | None = None,
        reservoir_from: Annotated[int, Field(ge=0)] = 3,
        query_chunk: Count = 1024,
    ) -> None:
        self.seed_size, self.step, self.rounds_epochs, self.output = seed_size, step, rounds_epochs, output
        self.periodic, self.reservoir, self.reservoir_from = periodic, reservoir, reservoir_from
        self.query_chunk = query_chunk

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return the size of the seed set, or the largest budget if that is less."""
        return min(self.seed_size, max(budgets))

    def first_training(self, pool_size: int, budgets: Sequence[int]) -> int:
        """Return the number of images in the seed set; see ``QueryAttack.first_training``."""
        return min(self.seed_size, budgets[-1])

    def queries(self, thief: Thief) -> Queries:
        """Query the seed set, then the steps of each round; endless unless both steps and pool are exhausted."""
        order = thief.random_order()
        queried: set[int] = set()
        number = 0
        for start in range(0, len(order), self.seed_size):
            seeds = order[start : start + self.seed_size]
            seeds = seeds[first_times(thief.pool[seeds], queried)]
            if not len(seeds):
                continue
            yield seeds
            grown = 1
            while grown:
                grown = yield from self._round(thief, queried, number)
                number += 1

    def step_of(self, number: int) -> float:
        """Return the signed step of a round, counted from 0: positive in the first ``periodic`` rounds."""
        return self.step if self.periodic is None or number // self.periodic % 2 == 0 else -self.step

    def _round(self, thief: Thief, queried: set[int], number: int) -> Generator[Images, Answers, int]:
        """Query the new points of a round, and return how many there were."""
        images, answers = thief.training_set()
        overrides: dict[str, Any] = {} if self.rounds_epochs is None else {"epochs": self.rounds_epochs}
        model = thief.new_model("round", number)
        with devices.exact():
            thief.fit(model, images, answers, "round", number, **overrides)
        labels = answers.argmax(1)
        if self.reservoir is not None and number >= self.reservoir_from and len(images) > self.reservoir:
            drawn = numpy_generator(thief.seed, "reservoir", number).choice(len(images), self.reservoir, replace=False)
            images, labels = images[drawn], labels[drawn]
        grown = 0
        # One query at a time: the budget cuts the last round, and points beyond the cut need not be computed.
        for start in range(0, len(images), self.query_chunk):
            part = slice(start, start + self.query_chunk)
            points = stepped(model, images[part], labels[part], self.step_of(number), self.output)
            points = points[first_times(points, queried)]
            if len(points):
                yield points
            grown += len(points)
        thief.log("new points", grown)
        return grown


def stepped(model: nn.Module, images: Images, labels: Labels, step: float, output: Output = "probability") -> Images:
    """Return ``clip(x + step * sign(dF_c(x) / dx))`` for a batch of images.

    Args:
        model: The substitute; moved to the device of this process and left there, in eval mode.
        images: uint8, (N, C, H, W), N >= 1.
        labels: The class c of each image, int64, (N,).
        step: In units of [0, 1], rounded to whole levels; a negative one lowers F.
        output: What F is. For a probability the sign is that of its logarithm's gradient, which is the same and does
            not vanish where a float32 probability does.

    Returns:
        uint8, (N, C, H, W).

    References:
        Papernot et al., 2017, equation of "Jacobian-based dataset augmentation" in section 4.2.
    """
    where = devices.device()
    model.to(where).eval()
    with devices.retain_freed_memory(), devices.exact(), torch.enable_grad():
        pixels = to_float(torch.tensor(images).to(where)).requires_grad_()
        outputs = model(pixels).float()
        if output == "probability":
            outputs = outputs.log_softmax(1)
        # Rows do not influence each other in eval mode, so the gradient of the sum holds each row's own.
        total = outputs.gather(1, torch.from_numpy(labels.astype(np.int64)).to(where)[:, None]).sum()
        (gradient,) = torch.autograd.grad(total, pixels)
    # Whole levels before the sum, not after it: 25.5 levels would be rounded up for one pixel and down for the next.
    levels = math.copysign(math.floor(255 * abs(step) + 0.5), step)
    moved = images + levels * gradient.sign().cpu().numpy()
    return moved.clip(0, 255).astype(np.uint8)


def first_times(images: Images, queried: set[int]) -> npt.NDArray[np.int64]:
    """Return the positions of images whose content is not in ``queried``, and add it there: int64, rising."""
    fresh = []
    for position, name in enumerate(content_names(images).tolist()):
        if name not in queried:
            queried.add(name)
            fresh.append(position)
    return np.array(fresh, np.int64)
