"""From several losses to one gradient: aggregators of torchjd by name, and MGDA with the authors' normalisations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torchjd.aggregation
from scipy.optimize import nnls
from torch import Tensor, nn
from torchjd.linalg import DualConeProjector

from mea_ray.core.errors import ConfigError
from mea_ray.core.registry import nearest

Normalisation = Literal["l2", "loss", "loss+", "none"]

AGGREGATORS = {
    "aligned_mtl": "AlignedMTL",
    "config": "ConFIG",
    "dual_proj": "DualProj",
    "grad_drop": "GradDrop",
    "grad_vac": "GradVac",
    "imtl_g": "IMTLG",
    "mean": "Mean",
    "mgda": "MGDA",
    "pcgrad": "PCGrad",
    "random": "Random",
    "sum": "Sum",
    "upgrad": "UPGrad",
}
"""Name in a config: class of ``torchjd.aggregation`` (those that need no further package)."""
DUAL_CONE = ("dual_proj", "upgrad")
"""Those that project onto the dual cone of the gradients."""

MAX_ITERATIONS = 250
TOLERANCE = 1e-9
LARGEST_NORMALISER = 10.0
EPSILON = 1e-5


def flat_gradients(terms: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradients of several losses, float32 (terms, parameters in all); the graph is kept."""
    rows = []
    for term in terms:
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs]))
    return torch.stack(rows)


def add_gradient(flat: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add a flat gradient to the ``.grad`` of the parameters, as ``backward`` does."""
    for piece, parameter in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True):
        gradient = piece.view_as(parameter).to(parameter.dtype)
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


class Weighting(ABC):
    """Turns the gradients of several losses into one."""

    @abstractmethod
    def aggregate(self, gradients: Tensor, values: Sequence[float]) -> Tensor:
        """Return one flat gradient (P,) for gradients (K, P) of losses with these values."""

    def backward(self, terms: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Accumulate the aggregated gradient into ``model``; returns the detached sum of the losses."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses = list(terms.values())
        gradients = flat_gradients(losses, parameters)
        add_gradient(self.aggregate(gradients, [float(loss.detach()) for loss in losses]), parameters)
        return torch.stack([loss.detach() for loss in losses]).sum()


class NonNegativeProjector(DualConeProjector):
    """torchjd's projection onto a dual cone, solved as non-negative least squares.

    torchjd's own projector needs two more packages. The program min v' G v subject to u <= v is, with v = u + s and
    G = L L', the same as min ||L' s + L' u|| over s >= 0.
    """

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:  # noqa: N803 - named by torchjd
        """Return weights (..., m) for vectors ``U`` (..., m) and the gradients' inner products ``G`` (m, m)."""
        gram = G.detach().double().cpu().numpy()
        size = max(float(np.trace(gram)), np.finfo(np.float64).tiny)
        lower = np.linalg.cholesky(gram / size + 1e-6 * np.eye(len(gram)))
        vectors = U.detach().double().cpu().numpy().reshape(-1, len(gram))
        weights = np.stack([u + nnls(lower.T, -lower.T @ u)[0] for u in vectors])
        return torch.as_tensor(weights.reshape(tuple(U.shape)), device=G.device, dtype=G.dtype)


class TorchJD(Weighting):
    """An aggregator of torchjd.

    Args:
        name: A key of ``AGGREGATORS``.
    """

    def __init__(self, name: str) -> None:
        arguments = {"projector": NonNegativeProjector()} if name in DUAL_CONE else {}
        self.aggregator = getattr(torchjd.aggregation, AGGREGATORS[name])(**arguments)

    def aggregate(self, gradients: Tensor, values: Sequence[float]) -> Tensor:
        """Return what the aggregator makes of the gradients."""
        combined: Tensor = self.aggregator(gradients)
        return combined


class MinNorm(Weighting):
    """MGDA (equation 9): weights on the simplex that minimise the norm of the weighted, normalised gradients.

    As in the authors' code the weights are found for the normalised gradients and then applied to the raw ones.

    Args:
        normalisation: Each gradient g of loss L is divided by ``l2``: ||g||; ``loss``: min(L, 10); ``loss+``:
            min(L ||g||, 10); ``none``: 1; plus 1e-5.
    """

    def __init__(self, normalisation: Normalisation = "loss+") -> None:
        self.normalisation = normalisation

    def weights(self, gradients: Tensor, values: Sequence[float]) -> Tensor:
        """Weights (K,) for gradients (K, P) of losses with these values; non-negative, their sum is 1."""
        return self.weights_of((gradients @ gradients.T).double().cpu(), values)

    def weights_of(self, gram: Tensor, values: Sequence[float]) -> Tensor:
        """Return the same from the raw gradients' inner products, float64 (K, K) on the CPU."""
        norms = gram.diagonal().clamp_min(0).sqrt()
        divisors = self._divisors(norms, torch.tensor(values, dtype=torch.float64)) + EPSILON
        return min_norm_weights(gram / (divisors[:, None] * divisors[None]))

    def _divisors(self, norms: Tensor, values: Tensor) -> Tensor:
        if self.normalisation == "l2":
            return norms
        if self.normalisation == "loss":
            return values.clamp_max(LARGEST_NORMALISER)
        if self.normalisation == "loss+":
            return (values * norms).clamp_max(LARGEST_NORMALISER)
        return torch.ones_like(norms)

    def aggregate(self, gradients: Tensor, values: Sequence[float]) -> Tensor:
        """Return the weighted sum of the raw gradients."""
        return self.weights(gradients, values).to(gradients) @ gradients


def two_weights(gram: Tensor) -> Tensor:
    """Closed form for two gradients; the authors' clamps .999 and .001 at the ends."""
    v11, v12, v22 = float(gram[0, 0]), float(gram[0, 1]), float(gram[1, 1])
    if v12 >= v11:
        gamma = 0.999
    elif v12 >= v22:
        gamma = 0.001
    else:
        gamma = (v22 - v12) / (v11 + v22 - 2 * v12)
    return torch.tensor([gamma, 1 - gamma], dtype=gram.dtype)


def min_norm_weights(gram: Tensor, iterations: int = MAX_ITERATIONS) -> Tensor:
    """Minimise w' G w over the simplex: closed form for two, Frank-Wolfe with exact line search for more.

    Args:
        gram: float64 (K, K), inner products of the gradients.
        iterations: Steps at most; the last iterate is returned when they do not suffice (the authors' code returns
            nothing then).

    Returns:
        float64 (K,), non-negative, sum 1.
    """
    count = len(gram)
    if count == 1:
        return torch.ones(1, dtype=gram.dtype)
    if count == 2:
        return two_weights(gram)
    weights = torch.full((count,), 1 / count, dtype=gram.dtype)
    for _ in range(iterations):
        slope = gram @ weights
        towards, away = int(slope.argmin()), int(torch.where(weights > 0, slope, -torch.inf).argmax())
        # Pairwise steps: moving weight from the worst to the best vertex converges linearly, plain ones zigzag.
        gap = float(slope[away] - slope[towards])
        curvature = float(gram[towards, towards] + gram[away, away] - 2 * gram[towards, away])
        if gap <= 0 or curvature <= 0:
            break
        step = min(gap / curvature, float(weights[away]))
        weights[towards] += step
        weights[away] -= step
        if 2 * step < TOLERANCE:
            break
    return weights


def make_weighting(name: str, normalisation: Normalisation = "loss+") -> Weighting | None:
    """Return the weighting called ``name``; None for ``fixed``.

    Raises:
        ConfigError: There is none of that name; the message lists them.
    """
    if name == "fixed":
        return None
    if name == "min_norm":
        return MinNorm(normalisation)
    if name not in AGGREGATORS:
        names = sorted([*AGGREGATORS, "fixed", "min_norm"])
        raise ConfigError(f"weighting={name!r} is unknown{nearest(name, names)} Known: {', '.join(names)}")
    return TorchJD(name)
