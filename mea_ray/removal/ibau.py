"""I-BAU: the worst perturbation common to all images is found and unlearnt, through an implicit hypergradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mea_ray.core.types import ImageSet
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import (
    Epochs,
    LearningRate,
    Prospect,
    Removal,
    Share,
    ThiefData,
    copied,
    labelled,
    part_of,
    tune,
)
from mea_ray.training.objective import Batch, Objective, StepContext, accumulate

Positive = Annotated[float, Field(gt=0)]


class ImplicitUnlearning(Removal):
    """Find one perturbation that misleads the suspect on all images, and tune it to be right under it.

    Choose it for a thief with few clean images who takes the mark for a trigger of any shape.

    The weights minimise the mean cross-entropy of f(x + d) with the API's class, where d is the perturbation that
    maximises it. A round finds d by a pass of gradient ascent over the images, on the loss less .001 |d|^2, within
    the L2 norm ``radius``. Then each batch updates the weights along the gradient of the loss in which d is a
    function of the weights: its inverse Hessian is replaced by ``terms`` terms of a Neumann series, those of the
    fixed point of a gradient step of ``inner_rate``. A share ``perturbed`` of a batch carries d.

    Defaults are those of the authors' code, in which a hundredth of a batch is perturbed; the paper perturbs all of it.
    The code bounds no norm: it has ``radius`` in a comment only. As there the network is in eval mode, and the fixed
    point is that of the first batch.

    Args:
        rounds: Rounds of ascent and of a pass over the images.
        terms: Terms of the Neumann series; 0 leaves d fixed, as in adversarial training.
        perturbed: Share of a batch that carries the perturbation.
        radius: Largest L2 norm of the perturbation, of images in [0, 1].
        ascent_rate: Learning rate of the ascent.
        inner_rate: Step of the map whose fixed point the perturbation is.
        share: Share of the thief's images that is used; null takes all.
        learning_rate: Of Adam.
        batch_size: Images in a batch.

    References:
        Zeng, Chen, Park, Mao, Jin and Jia, Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022,
        https://arxiv.org/abs/2110.03735, algorithm 1, and the code at https://github.com/YiZeng623/I-BAU.
    """

    name = "ibau"

    def __init__(
        self,
        *,
        rounds: Epochs = 5,
        terms: Annotated[int, Field(ge=0, le=50)] = 5,
        perturbed: Annotated[float, Field(gt=0, le=1)] = 0.01,
        radius: Positive = 10.0,
        ascent_rate: Positive = 10.0,
        inner_rate: Positive = 0.1,
        share: Share | None = None,
        learning_rate: LearningRate = 1e-3,
        batch_size: Annotated[int, Field(ge=1)] = 100,
    ) -> None:
        self.rounds, self.share = rounds, share
        self.learning_rate, self.batch_size = learning_rate, batch_size
        self.series: dict[str, Any] = {
            "terms": terms,
            "perturbed": perturbed,
            "radius": radius,
            "ascent_rate": ascent_rate,
            "inner_rate": inner_rate,
        }

    @property
    def strength(self) -> float:
        """Rounds."""
        return float(self.rounds)

    def check(self, prospect: Prospect) -> None:
        """Refuse batches of one image."""
        prospect.check_batches(part_of(prospect.images, self.share), self.batch_size)

    def remove(self, model: ImageModel, thief: ThiefData, seed: int) -> ImageModel:
        """Return the tuned copy."""
        data = labelled(thief.take(part_of(len(thief.images), self.share), seed), model.classes)
        changes: dict[str, Any] = {"optimizer": "adam", "weight_decay": 0.0, "schedule": "constant", "augment": ()}
        changes |= {"learning_rate": self.learning_rate, "batch_size": self.batch_size, "epochs": self.rounds}
        objective = MinMax(data, self.batch_size, **self.series)
        return tune(copied(model), data, thief, seed, objective=objective, **changes)


def hypergradient(
    outer: Tensor, perturbation: Tensor, mapped: Tensor, parameters: Sequence[nn.Parameter], terms: int
) -> list[Tensor]:
    """Return the gradient of an outer loss whose perturbation is the fixed point of a map, by a Neumann series.

    With the map P(d, w), the loss L(d, w) and v = sum over j < ``terms`` of (dP/dd)^j dL/dd (transposed) it is
    dL/dw + (dP/dw) v.

    Args:
        outer: L, a scalar with a graph in ``perturbation`` and ``parameters``.
        perturbation: d, a leaf.
        mapped: P(d, w), of the shape of d, with a graph in both.
        parameters: w.
        terms: Terms of the series.

    References:
        Grazzi et al., On the Iteration Complexity of Hypergradient Computation, ICML 2020, the fixed-point method.
    """
    direct = torch.autograd.grad(outer, [perturbation, *parameters], allow_unused=True, retain_graph=True)
    by_d, by_w = direct[0], direct[1:]
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, by_w, strict=True)]
    if not terms or by_d is None:
        return gradients
    v = torch.zeros_like(by_d)
    for _ in range(terms):
        (back,) = torch.autograd.grad(mapped, perturbation, grad_outputs=v, retain_graph=True)
        v = back + by_d
    implicit = torch.autograd.grad(mapped, parameters, grad_outputs=v, allow_unused=True)
    return [own if more is None else own + more for own, more in zip(gradients, implicit, strict=True)]


class MinMax(Objective):
    """The loss of ``ImplicitUnlearning``; an epoch is a round.

    Args:
        data: The images with the API's classes; the ascent passes over them in this order.
        batch_size: Images in a step of the ascent.
        terms: See ``ImplicitUnlearning``, as all that follow.
        perturbed: Share of a batch.
        radius: Largest norm.
        ascent_rate: Of the ascent.
        inner_rate: Of the map.
    """

    resumable = True

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        terms: int,
        perturbed: float,
        radius: float,
        ascent_rate: float,
        inner_rate: float,
    ) -> None:
        super().__init__()
        self.images, self.labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
        self.batch_size, self.series, self.perturbed, self.radius = batch_size, terms, perturbed, radius
        self.ascent_rate, self.inner_rate = ascent_rate, inner_rate
        self.perturbation: Tensor | None = None

    def start(self, context: StepContext) -> None:
        """Move the images to the device."""
        super().start(context)
        self.images, self.labels = self.images.to(context.device), self.labels.to(context.device)

    def start_epoch(self, epoch: int) -> None:
        """Begin a round: the perturbation is looked for anew."""
        self.perturbation = None

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility``, the cross-entropy of a batch of which a share is perturbed."""
        model.eval()
        with torch.autocast(batch.images.device.type, enabled=False):
            if self.perturbation is None:
                self.perturbation = self.ascend(model)
            leaf = self.perturbation = self.perturbation.detach().requires_grad_()
            count = max(1, int(len(batch.images) * self.perturbed))
            chosen = torch.randperm(len(batch.images), generator=self.context.generator)[:count]
            mask = torch.zeros(len(batch.images), 1, 1, 1)
            mask[chosen] = 1
            images = batch.images.float() + mask.to(batch.images.device) * leaf
            return {"utility": F.cross_entropy(model(images), batch.labels)}

    def backward(self, terms: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Accumulate the hypergradient."""
        assert self.perturbation is not None
        leaf = self.perturbation
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        (slope,) = torch.autograd.grad(self._inner(model, leaf, 0), leaf, create_graph=True)
        gradients = hypergradient(terms["utility"], leaf, leaf - self.inner_rate * slope, parameters, self.series)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            accumulate(parameter, gradient)
        return terms["utility"].detach()

    def ascend(self, model: nn.Module) -> Tensor:
        """Return the perturbation after a pass of gradient ascent from 0, float32 (1, C, H, W)."""
        d = torch.zeros_like(self.images[:1], dtype=torch.float32).requires_grad_()
        for start in range(0, len(self.images), self.batch_size):
            (slope,) = torch.autograd.grad(self._inner(model, d, start), d)
            with torch.no_grad():
                d -= self.ascent_rate * slope
        within: Tensor = d.detach() * min(1.0, self.radius / max(float(d.detach().norm()), 1e-12))
        return within

    def _inner(self, model: nn.Module, d: Tensor, start: int) -> Tensor:
        """Return what a perturbation minimises on the batch that begins at an image: a scalar."""
        part = slice(start, start + self.batch_size)
        images = self.images[part].float() / 255 + d
        loss: Tensor = 0.001 * d.square().sum() - F.cross_entropy(model(images), self.labels[part])
        return loss
