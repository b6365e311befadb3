"""Extraction by Jacobian-based dataset augmentation: steps from what was answered, where a substitute changes most."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.attacks.driver import Ask, Queries, Thief, TransferAttack, content_names
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers, Images, Labels
from mea_ray.training import device as devices
from mea_ray.training.augment import to_float

Output = Literal["probability", "logit"]


class Jbda(TransferAttack):
    """Query a seed set, then steps from every answered image along the sign of a fresh substitute's gradient.

    A round trains a substitute from new weights on all answers so far, and makes of each answered image x the image
    ``clip(x + step * sign(dF_c(x) / dx))``, where c is the class that the victim gave to x (never a label of the
    thief's own). Those that were not asked yet are asked, and the next round starts from both. A set of n images grows
    to 2n at most, so rounds follow each other until the budget is spent; it cuts the last one.

    An API takes pictures, and a pixel of a picture has 256 levels. So ``step`` is rounded to whole levels, and made
    images are uint8, clipped to 0..255: victim and substitute see the same image, and equal images are recognised.

    A round in which every step was asked before (clipping, or a gradient of zero) adds ``seed_size`` fresh images of
    the pool instead. When the pool has no more, the attack ends, and later rungs hold fewer queries than their budget.

    Args:
        seed_size: Images of the pool that are asked first, whatever the budget.
        step: Length of a step in each pixel, in units of [0, 1], rounded to whole levels of 1/255 (0.1 is 26 of
            them): lambda of the paper.
        rounds_epochs: Epochs that the substitute of a round is trained; null takes those of ``thief.training``.
        output: What is differentiated: the substitute's ``probability`` of the class, or its ``logit``. The paper's F
            is a network that ends with a softmax.
        periodic: The step changes its sign after every so many rounds (tau); null never.
        reservoir: Images that a round steps from, drawn evenly from all answered ones (kappa); null takes all.
        reservoir_from: Rounds before the first one that is limited by ``reservoir`` (sigma).
        query_chunk: Images in a query; the answers of one are on the disk before the next is asked.

    References:
        Papernot et al., Practical Black-Box Attacks against Machine Learning, 2017, https://arxiv.org/abs/1602.02697,
        algorithm 1. Periodic steps and the reservoir: Papernot et al., Transferability in Machine Learning, 2016,
        https://arxiv.org/abs/1605.07277, whose reservoir sampling draws an even subset, as here.

    Raises:
        ConfigError: A parameter is out of its range.
    """

    def __init__(
        self,
        *,
        seed_size: int = 150,
        step: float = 0.1,
        rounds_epochs: int | None = None,
        output: Output = "probability",
        periodic: int | None = None,
        reservoir: int | None = None,
        reservoir_from: int = 3,
        query_chunk: int = 1024,
    ) -> None:
        for name, value in (
            ("seed_size", seed_size),
            ("rounds_epochs", rounds_epochs),
            ("periodic", periodic),
            ("reservoir", reservoir),
            ("query_chunk", query_chunk),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if not 1 / 255 <= step <= 1:
            raise ConfigError(f"step={step} must lie in [1/255, 1]: pixels lie in [0, 1] and have 256 levels")
        if reservoir_from < 0:
            raise ConfigError(f"reservoir_from={reservoir_from} must be at least 0 rounds")
        if output not in {"probability", "logit"}:
            raise ConfigError(f"output={output!r} must be probability or logit")
        self.seed_size, self.step, self.rounds_epochs, self.output = seed_size, step, rounds_epochs, output
        self.periodic, self.reservoir, self.reservoir_from = periodic, reservoir, reservoir_from
        self.query_chunk = query_chunk

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return the size of the seed set, or the largest budget if that is less."""
        return min(self.seed_size, max(budgets))

    def queries(self, thief: Thief) -> Queries:
        """Ask the seed set, then the steps of each round; endless unless steps and pool run dry."""
        order = thief.shuffled()
        asked: set[int] = set()
        number = 0
        for start in range(0, len(order), self.seed_size):
            seeds = order[start : start + self.seed_size]
            seeds = seeds[first_times(thief.pool[seeds], asked)]
            if not len(seeds):
                continue
            yield thief.from_pool(seeds)
            grown = 1
            while grown:
                grown = yield from self._round(thief, asked, number)
                number += 1

    def step_of(self, number: int) -> float:
        """Return the signed step of a round, counted from 0: positive in the first ``periodic`` rounds."""
        return self.step if self.periodic is None or number // self.periodic % 2 == 0 else -self.step

    def _round(self, thief: Thief, asked: set[int], number: int) -> Generator[Ask, Answers, int]:
        """Ask the new points of a round, and return how many there were."""
        images, answers = thief.learnt()
        overrides: dict[str, Any] = {} if self.rounds_epochs is None else {"epochs": self.rounds_epochs}
        model = thief.new_model("round", number)
        with devices.exact():
            thief.fit(model, images, answers, "round", number, **overrides)
        labels = answers.argmax(1)
        if self.reservoir is not None and number >= self.reservoir_from and len(images) > self.reservoir:
            drawn = numpy_generator(thief.seed, "reservoir", number).choice(len(images), self.reservoir, replace=False)
            images, labels = images[drawn], labels[drawn]
        grown = 0
        # A query at a time: the last round is cut by the budget, and what lies behind the cut need not be computed.
        for start in range(0, len(images), self.query_chunk):
            part = slice(start, start + self.query_chunk)
            points = stepped(model, images[part], labels[part], self.step_of(number), self.output)
            points = points[first_times(points, asked)]
            if len(points):
                yield Ask(points)
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
        output: What F is. The sign for a probability is taken of its logarithm, which has the same one and does not
            vanish where a float32 probability does.

    Returns:
        uint8, (N, C, H, W).

    References:
        Papernot et al., 2017, equation of "Jacobian-based dataset augmentation" in section 4.2.
    """
    where = devices.device()
    model.to(where).eval()
    with devices.kept_memory(), devices.exact(), torch.enable_grad():
        pixels = to_float(torch.tensor(images).to(where)).requires_grad_()
        said = model(pixels).float()
        if output == "probability":
            said = said.log_softmax(1)
        # Rows do not see each other in eval mode, so the gradient of the sum holds each row's own.
        total = said.gather(1, torch.from_numpy(labels.astype(np.int64)).to(where)[:, None]).sum()
        (gradient,) = torch.autograd.grad(total, pixels)
    # Whole levels before the sum, not after it: 25.5 levels would be rounded up for one pixel and down for the next.
    levels = math.copysign(math.floor(255 * abs(step) + 0.5), step)
    moved = images + levels * gradient.sign().cpu().numpy()
    return moved.clip(0, 255).astype(np.uint8)


def first_times(images: Images, asked: set[int]) -> npt.NDArray[np.int64]:
    """Return the positions of images whose content is new, and note it in ``asked``: int64, rising."""
    fresh = []
    for position, name in enumerate(content_names(images).tolist()):
        if name not in asked:
            asked.add(name)
            fresh.append(position)
    return np.array(fresh, np.int64)
