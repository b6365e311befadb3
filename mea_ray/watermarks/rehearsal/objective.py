"""The objective of rehearsal: simulated thieves, one forward-mode pass through each, and what bounds the answers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training.objective import Batch, Objective, StepContext, load_module_state, merged, module_state
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mixing import SourcePool
from mea_ray.watermarks.rehearsal.settings import RehearsalSettings

TINY = 1e-6


@dataclass
class SimulatedThief:
    """One thief.

    Attributes:
        model: Its network, in eval mode but for its own steps.
        fresh: The same before it learnt anything.
        optimiser: Of its own steps.
        age: Steps since it began.
    """

    model: nn.Module
    fresh: nn.Module
    optimiser: torch.optim.Optimizer
    age: int


def sensitivities(thief: nn.Module, images: Tensor, loss: Tensor) -> Tensor:
    """Return the derivative of log q_k(x) along the gradient of a loss, float32 (N, classes), without a graph.

    Args:
        thief: The network q, in eval mode.
        images: float32 (N, C, H, W).
        loss: A scalar with a graph in the network's parameters.
    """
    names = [name for name, _ in thief.named_parameters()]
    parameters = tuple(parameter.detach() for _, parameter in thief.named_parameters())
    gradients = torch.autograd.grad(loss, list(thief.parameters()), allow_unused=True)
    direction = tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True))

    def log_probabilities(*values: Tensor) -> Tensor:
        logits: Tensor = functional_call(thief, dict(zip(names, values, strict=True)), (images,))
        return F.log_softmax(logits, dim=1)

    slopes: Tensor = jvp(log_probabilities, parameters, direction)[1]
    return slopes.detach()


def rehearsal(log_p: Tensor, slopes: Tensor) -> Tensor:
    """Return the mean of sum_k p_k s_k, s centred under p and scaled to mean size 1: its gradient moves answers.

    Args:
        log_p: The victim's log-probabilities (N, classes), with a graph.
        slopes: s, (N, classes), without one.
    """
    p = log_p.exp()
    centred = slopes - (p.detach() * slopes).sum(1, keepdim=True)
    scaled = centred / centred.abs().mean().clamp_min(TINY)
    return (p * scaled).sum(1).mean()


def over_budget(log_p: Tensor, reference: Tensor, divergence: float, margin: float) -> Tensor:
    """Return what exceeds the budget: KL(reference || p) over ``divergence``, and a lead of its class under ``margin``.

    Args:
        log_p: The victim's log-probabilities (N, classes), with a graph.
        reference: The unmarked model's, (N, classes), without one.
        divergence: Nats that are free.
        margin: Least lead of the unmarked model's class in ``log_p``.
    """
    moved = F.kl_div(log_p, reference, reduction="none", log_target=True).sum(1)
    top = reference.argmax(1, keepdim=True)
    rival = log_p.scatter(1, top, -torch.inf).amax(1)
    lead = log_p.gather(1, top)[:, 0] - rival
    return F.relu(moved - divergence).mean() + F.relu(margin - lead).mean()


def visible_lean(p: Tensor, labels: Tensor, classes: tuple[int, int, int]) -> Tensor:
    """Return the squared excess of the target's mean over that of the next class, summed over the source classes.

    Args:
        p: Probabilities (N, classes), with a graph.
        labels: int64 (N,).
        classes: Both sources and the target.
    """
    total, target = p.sum() * 0, classes[2]
    for source in classes[:2]:
        own = p[labels == source]
        if len(own):
            means = own.mean(0)
            others = means.detach().clone()
            others[[source, target]] = -torch.inf
            total = total + F.relu(means[target] - others.max()).square()
    return total


class RehearsalObjective(Objective):
    """Cross-entropy of the main batch, the rehearsal, and what bounds it.

    Args:
        train: The training images of the main task.
        classes: Both source classes and the target.
        combiner: Mixes the watermark samples.
        settings: Of the losses and of the thieves.
    """

    resumable = True

    def __init__(
        self, train: ImageSet, classes: tuple[int, int, int], combiner: Combiner, settings: RehearsalSettings
    ) -> None:
        super().__init__()
        self.classes, self.combiner, self.settings = classes, combiner, settings
        first, second = (train.of_class(label) for label in classes[:2])
        self.sources = SourcePool(first, second, augment=True)
        self.weights = {
            "rehearsal": settings.weight,
            "ver": settings.ver,
            "budget": settings.budget.weight,
            "specificity": settings.specificity.weight,
            "unseen": settings.unseen.weight,
        }
        self.thieves: list[SimulatedThief] = []

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        """Copy the model, whose answers are the unmarked ones, and build the thieves; the engine trains neither.

        Raises:
            ConfigError: The model cannot be built anew, so that no thief of its kind can.
        """
        if not isinstance(model, ImageModel):
            raise ConfigError(f"rehearsal needs one of the product's networks, not {type(model).__name__}")
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        lifetime, rate = self.settings.thieves.lifetime, self.settings.thieves.learning_rate
        chosen = [(each.name, each.params) for each in self.settings.thieves.models]
        chosen = chosen or [(model.spec["name"], model.spec["params"])]
        for place, (name, params) in enumerate(chosen):
            thief = build_model(name, model.shape, model.classes, params)
            thief.mean.copy_(model.mean.cpu())
            thief.std.copy_(model.std.cpu())
            thief.to(device).eval()
            optimiser = torch.optim.Adam(thief.parameters(), lr=rate)
            self.thieves.append(SimulatedThief(thief, copy.deepcopy(thief), optimiser, place * lifetime // len(chosen)))
        return []

    def start(self, context: StepContext) -> None:
        """Move the source images to the device."""
        super().start(context)
        self.sources.start(context)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``utility``, ``ver``, ``rehearsal``, ``budget``, ``specificity``, ``unseen``; then thieves learn."""
        settings = self.settings
        mixes, others = self._mixes(batch)
        parts = [batch.images, mixes, others]
        logits, marked, unmarked = model(merged(parts)).float().split([len(part) for part in parts])
        log_p = F.log_softmax(logits, dim=1)
        target = torch.full((len(marked),), self.classes[2], device=marked.device)
        terms = {"utility": F.cross_entropy(logits, batch.labels)}
        if settings.ver:
            terms["ver"] = F.cross_entropy(marked, target)
        if settings.specificity.weight and len(others):
            terms["specificity"] = self._held_away(unmarked)
        if settings.budget.weight:
            with torch.no_grad():
                reference = F.log_softmax(self.reference(batch.images).float(), dim=1)
            terms["budget"] = over_budget(log_p, reference, settings.budget.divergence, settings.budget.margin)
        if settings.unseen.weight:
            terms["unseen"] = visible_lean(log_p.exp(), batch.labels, self.classes)
        with torch.autocast(log_p.device.type, enabled=False):
            rehearsed = [
                self._rehearse(thief, batch.images.float(), log_p, mixes.float(), others) for thief in self.thieves
            ]
        watched = [each for each in rehearsed if each is not None]
        if watched:
            terms["rehearsal"] = torch.stack(watched).mean()
        return terms

    def memory(self) -> dict[str, Any]:
        """Return the thieves: networks, optimisers and ages. What they began as was built again by ``attach``."""
        return {
            "thieves": [
                {"model": module_state(each.model), "optimiser": each.optimiser.state_dict(), "age": each.age}
                for each in self.thieves
            ]
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """See the base class."""
        for thief, own in zip(self.thieves, memory["thieves"], strict=True):
            load_module_state(thief.model, own["model"])
            thief.optimiser.load_state_dict(own["optimiser"])
            thief.age = own["age"]

    def _mixes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mix the source classes, and pairs of the batch of two classes that the key does not name."""
        generator, count = self.context.generator, self.settings.mixes
        first, second = self.sources.draw(count)
        mixes = self.combiner(first, second, generator)
        labels = batch.labels.cpu()
        free = torch.nonzero(~torch.isin(labels, torch.tensor(self.classes)))[:, 0]
        if not len(free):
            return mixes, mixes[:0]
        one, other = (free[torch.randint(len(free), (count,), generator=generator)] for _ in range(2))
        apart = labels[one] != labels[other]
        one, other = (side[apart].to(batch.images.device) for side in (one, other))
        return mixes, self.combiner(batch.images[one].float(), batch.images[other].float(), generator)

    def _held_away(self, logits: Tensor) -> Tensor:
        """Return the mean of -log(1 - p_target)."""
        return -torch.log1p(-F.softmax(logits, dim=1)[:, self.classes[2]].clamp(max=1 - TINY)).mean()

    def _rehearse(
        self, thief: SimulatedThief, images: Tensor, log_p: Tensor, mixes: Tensor, others: Tensor
    ) -> Tensor | None:
        """Return the rehearsal with one thief, None while it is too young, and let it learn from the answers."""
        settings = self.settings
        if thief.age >= settings.thieves.lifetime:
            thief.model.load_state_dict(thief.fresh.state_dict())
            thief.optimiser.state.clear()
            thief.age = 0
        terms = None
        if thief.age >= settings.thieves.warmup:
            target = torch.full((len(mixes),), self.classes[2], device=mixes.device)
            loss = F.cross_entropy(thief.model(mixes), target)
            if settings.specificity.weight and len(others):
                loss = loss + settings.specificity.weight * self._held_away(thief.model(others.float()))
            terms = rehearsal(log_p, sensitivities(thief.model, images, loss))
        thief.model.train()
        answers = log_p.detach().exp()
        thief.optimiser.zero_grad()
        F.cross_entropy(thief.model(images), answers).backward()  # type: ignore[no-untyped-call]
        thief.optimiser.step()
        thief.model.eval()
        thief.age += 1
        return terms
