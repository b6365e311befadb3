"""Black-Box Dissector: a thief that gets labels alone erases what its substitute attends to, and queries again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.attacks.erasing import AREA, RATIO, erased, grad_cam
from mea_ray.attacks.learning import Learning
from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers, Images
from mea_ray.evaluation import metrics
from mea_ray.training import device as devices
from mea_ray.training.objective import Batch, Objective, StepContext

Count = Annotated[int, Field(ge=1)]


class BlackBoxDissector(QueryAttack):
    """Query images, and copies without the region that a substitute attends to; learn from labels alone.

    Choose it against an API that answers with labels alone.

    A round trains a substitute from new weights on all answers so far. It makes ``variants`` copies of each queried
    image of the pool, each with a rectangle erased. The rectangle's centre is drawn from the Grad-CAM map of the
    answered class. The copy on which the substitute gives that class the least probability is a candidate. The
    candidates with the most confident predictions are queried. They make up the share ``erased`` of a round; the rest
    are new images of the pool. An image is erased once.

    Substitutes learn the cross-entropy with the answered class, whatever else an answer says, and ``distill`` times
    KL(mean of their own answers to ``erasings`` randomly erased copies || answer). Rectangles are those of random
    erasing: .02 to .4 of the image, sides at a ratio of .3 to 3.3, filled with random pixels.

    The paper's own text was not at hand; its method and constants (10 variants, these rectangles) are from a
    description of it. How a round is divided is this project's choice; so are two copies in a training step instead
    of ten.

    Args:
        initial: Images of the pool queried before the first round, whatever the budget.
        round_images: Images queried in a round.
        round_epochs: Epochs that the substitute of a round is trained; null takes those of ``thief.training``.
        erased: Share of a round's images that have a part erased.
        variants: Erased copies of an image, of which one becomes a candidate.
        erasings: Randomly erased copies in a training step, for each image.
        distill: Weight of the self-distillation. 0 switches it off.
        query_chunk: Images in a query; the answers of one are on the disk before the next is sent.

    References:
        Wang et al., Black-Box Dissector: Towards Erasing-Based Hard-Label Model Stealing Attack, ECCV 2022,
        https://arxiv.org/abs/2105.00623.
    """

    def __init__(
        self,
        *,
        initial: Count = 1000,
        round_images: Count = 1000,
        round_epochs: Count | None = None,
        erased: Annotated[float, Field(gt=0, le=1)] = 0.5,
        variants: Count = 10,
        erasings: Count = 2,
        distill: Annotated[float, Field(ge=0)] = 1.0,
        query_chunk: Count = 1024,
    ) -> None:
        self.initial, self.round_images, self.round_epochs = initial, round_images, round_epochs
        self.erased, self.variants, self.erasings, self.distill = erased, variants, erasings, distill
        self.query_chunk = query_chunk

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return half of the largest budget: each image of the pool is queried once as it is, and once erased."""
        return -(-max(budgets) // 2)

    def first_training(self, pool_size: int, budgets: Sequence[int]) -> int:
        """Return the number of initial images; see ``QueryAttack.first_training``."""
        return min(self.initial, budgets[-1])

    def objective(self, learning: Learning, answers: Answers) -> SelfDistillation:
        """Return the loss, see the class."""
        return SelfDistillation(answers, self.erasings, self.distill)

    def queries(self, thief: Thief) -> Queries:
        """Query the initial images, then those of each round, until no image is left to query or to erase."""
        order = thief.random_order()
        fresh, uncut = order[self.initial :], order[: self.initial]
        answered = (yield uncut).argmax(1)
        number = 0
        while len(fresh) or len(uncut):
            model = self._substitute(thief, number)
            cut = min(len(uncut), self.round_images if not len(fresh) else round(self.erased * self.round_images))
            made, chosen = self._dissected(thief.pool[uncut], answered, model, cut, thief.seed, number)
            uncut, answered = np.delete(uncut, chosen), np.delete(answered, chosen)
            if len(made):
                yield made
            count = self.round_images - len(made)
            new, fresh = fresh[:count], fresh[count:]
            if len(new):
                labels = (yield new).argmax(1)
                uncut, answered = np.concatenate([uncut, new]), np.concatenate([answered, labels])
            number += 1

    def _substitute(self, thief: Thief, number: int) -> nn.Module:
        images, answers = thief.training_set()
        changes: dict[str, Any] = {} if self.round_epochs is None else {"epochs": self.round_epochs}
        model = thief.new_model("round", number)
        with devices.exact():
            thief.fit(model, images, answers, "round", number, **changes)
        return model

    def _dissected(
        self,
        images: Images,
        labels: npt.NDArray[np.int64],
        model: nn.Module,
        count: int,
        seed: int,
        number: int,
    ) -> tuple[Images, npt.NDArray[np.int64]]:
        """Return ``count`` erased images, the most confident predictions first, and their positions in ``images``."""
        if not count:
            return images[:0], np.zeros(0, np.int64)
        chunk = self.query_chunk
        starts = range(0, len(images), chunk)
        attention = np.concatenate([grad_cam(model, images[s : s + chunk], labels[s : s + chunk]) for s in starts])
        best, least = images.copy(), np.full(len(images), np.inf)
        sure = np.zeros(len(images))
        for variant in range(self.variants):
            made = erased(images, attention, numpy_generator(seed, "erased", number, variant))
            given = metrics.probabilities(model, made)
            own = given[np.arange(len(images)), labels]
            better = own < least
            best[better], least[better], sure[better] = made[better], own[better], given[better].max(1)
        chosen = np.argsort(-sure, kind="stable")[:count]
        return best[chosen], chosen


class SelfDistillation(Objective):
    """Cross-entropy with the answered class, and the distance to the network's own answers to erased copies.

    Args:
        answers: float32 (N, classes), of the training images, in their order; only their largest counts.
        erasings: Randomly erased copies of each image.
        weight: Weight of the distance.
    """

    resumable = True

    def __init__(self, answers: Answers, erasings: int, weight: float) -> None:
        super().__init__()
        self.labels = torch.from_numpy(answers.argmax(1))
        self.erasings, self.weights = erasings, {"distillation": weight}

    def start(self, context: StepContext) -> None:
        """Move the labels to the device."""
        super().start(context)
        self.labels = self.labels.to(context.device)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility`` and, if it has a weight, ``distillation``."""
        logits = model(batch.images).float()
        terms = {"utility": F.cross_entropy(logits, self.labels[batch.indices])}
        if self.weights["distillation"]:
            with torch.no_grad():
                copies = [erased_batch(batch.images, self.context.generator) for _ in range(self.erasings)]
                own = torch.stack([F.softmax(model(copy).float(), 1) for copy in copies]).mean(0)
            terms["distillation"] = F.kl_div(F.log_softmax(logits, 1), own, reduction="batchmean")
        return terms


def erased_batch(images: Tensor, generator: torch.Generator) -> Tensor:
    """Erase a rectangle of each image at a random place: float32 (N, C, H, W), as ``images``."""
    count, _, height, width = images.shape
    low, high = AREA
    area = (low + (high - low) * torch.rand(count, generator=generator)) * height * width
    low, high = np.log(RATIO)
    ratio = torch.exp(low + (high - low) * torch.rand(count, generator=generator))
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top = (torch.rand(count, generator=generator) * (height - tall + 1)).floor()
    left = (torch.rand(count, generator=generator) * (width - wide + 1)).floor()
    rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None]
    top, tall, left, wide = (value[:, None, None] for value in (top, tall, left, wide))
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    noise = torch.rand(images.shape, generator=generator).to(images.device)
    return torch.where(inside[:, None].to(images.device), noise.to(images.dtype), images)
