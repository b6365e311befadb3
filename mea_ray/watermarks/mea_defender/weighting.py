"""From several losses to one gradient: the base of all aggregators, and MGDA (equation 9)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torchjd.aggregation
from pydantic import Field
from scipy.optimize import nnls
from torch import Tensor, nn

from mea_ray.training.objective import accumulate
from mea_ray.watermarks.aggregators import AGGREGATORS

Normalisation = Literal["l2", "loss", "loss+", "none"]

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
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    for piece, parameter in zip(pieces, parameters, strict=True):
        accumulate(parameter, piece.view_as(parameter))


class Weighting(ABC):
    """Turns the gradients of several losses into one."""

    @abstractmethod
    def aggregate(self, gradients: Tensor, values: Sequence[float]) -> Tensor:
        """Return one flat gradient (P,) for gradients (K, P) of losses with these values."""

    def memory(self) -> dict[str, Any]:
        """Return what the next aggregation depends on beside its arguments and torch's global generator."""
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:  # noqa: B027 - most have none
        """Take over what ``memory`` returned in another process."""

    def backward(self, terms: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Accumulate the aggregated gradient into ``model``; returns the detached sum of the losses.

        All losses are functions of all parameters: the victim has one head, so that there is no part of the network
        that belongs to one loss alone.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses = list(terms.values())
        gradients = flat_gradients(losses, parameters)
        add_gradient(self.aggregate(gradients, [float(loss.detach()) for loss in losses]), parameters)
        return torch.stack([loss.detach() for loss in losses]).sum()


class Mgda(Weighting):
    """MGDA (equation 9): weights on the simplex that minimise the norm of the weighted, normalised gradients.

    Choose it as in the paper; ``weights`` has its settings.

    As in the authors' code the weights are found for normalised gradients and then applied to the raw ones. They are
    smoothed over the steps (CR-MOGM): those of one small batch jump from loss to loss, and they depend on the very
    gradients that they multiply, which biases the step.

    Args:
        normalisation: Each gradient g of loss L is divided by ``l2``: ||g||; ``loss``: min(L, 10); ``loss+``:
            min(L ||g||, 10); ``none``: 1; plus 1e-5.
        smoothing: Part of the last step's weights in this step's, in [0, 1); 0 takes each step's own.

    References:
        Désidéri, Multiple-gradient descent algorithm, 2012; Sener and Koltun, Multi-task learning as multi-objective
        optimization, NeurIPS 2018; Zhou et al., On the convergence of stochastic multi-objective gradient manipulation
        and beyond, NeurIPS 2022 (CR-MOGM).
    """

    def __init__(
        self, *, normalisation: Normalisation = "loss+", smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    ) -> None:
        self.normalisation = normalisation
        self.smoothed = torchjd.aggregation.CRMOGMWeighting(_MinNorm(), alpha=smoothing)
        self._losses = 0

    def weights(self, gradients: Tensor, values: Sequence[float]) -> Tensor:
        """Weights, float64 (K,), for gradients (K, P) of losses with these values; non-negative, their sum is 1."""
        if len(values) != self._losses:
            # The warm-up adds losses in the course of a training.
            self.smoothed.reset()
            self._losses = len(values)
        gram = (gradients @ gradients.T).double().cpu()
        smoothed: Tensor = self.smoothed(normalised(gram, values, self.normalisation))
        return smoothed

    def aggregate(self, gradients: Tensor, values: Sequence[float]) -> Tensor:
        """Return the weighted sum of the raw gradients, with weights whose mean is 1."""
        return len(values) * self.weights(gradients, values).to(gradients) @ gradients

    def memory(self) -> dict[str, Any]:
        """Return the smoothed weights."""
        return {"losses": self._losses, "smoothed": self.smoothed._lambda}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """See the base class."""
        self._losses, self.smoothed._lambda = memory["losses"], memory["smoothed"]


class _MinNorm(torchjd.aggregation.Weighting[Tensor]):
    """``min_norm_weights`` as a weighting of torchjd."""

    def forward(self, stat: Tensor, /) -> Tensor:
        """Return weights (K,) for a Gramian (K, K)."""
        return torch.from_numpy(min_norm_weights(stat.numpy()))


def normalised(gram: Tensor, values: Sequence[float], normalisation: Normalisation) -> Tensor:
    """Return the inner products of normalised gradients, float64 (K, K).

    Args:
        gram: Inner products of the raw gradients, float64 (K, K).
        values: The losses.
        normalisation: See ``Mgda``.
    """
    norms, losses = gram.diagonal().clamp_min(0).sqrt(), torch.tensor(values, dtype=torch.float64)
    divisors = {
        "l2": norms,
        "loss": losses.clamp_max(LARGEST_NORMALISER),
        "loss+": (losses * norms).clamp_max(LARGEST_NORMALISER),
        "none": torch.ones_like(norms),
    }[normalisation] + EPSILON
    return gram / (divisors[:, None] * divisors[None])


def min_norm_weights(gram: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Minimise w' G w over the simplex.

    With w = s u and u on the simplex, the least of w' G w + (1 - sum w)^2 over w >= 0 is reached where u' G u is least:
    a problem of non-negative least squares.

    Args:
        gram: float64 (K, K), inner products of the gradients.

    Returns:
        float64 (K,), non-negative, sum 1.
    """
    scale = max(float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny)
    values, vectors = np.linalg.eigh(gram / scale)
    root = np.sqrt(values.clip(0))[:, None] * vectors.T
    system = np.vstack([root, np.ones(len(gram))])
    solution = nnls(system, np.append(np.zeros(len(gram)), 1.0))[0]
    weights: npt.NDArray[np.float64] = solution / solution.sum()
    return weights


def two_task_weights(gram: Tensor) -> Tensor:
    """Closed form for two gradients; the authors' clamps .999 and .001 at the ends."""
    v11, v12, v22 = float(gram[0, 0]), float(gram[0, 1]), float(gram[1, 1])
    if v12 >= v11:
        gamma = 0.999
    elif v12 >= v22:
        gamma = 0.001
    else:
        gamma = (v22 - v12) / (v11 + v22 - 2 * v12)
    return torch.tensor([gamma, 1 - gamma], dtype=gram.dtype)


def make_weighting(method: str, normalisation: Normalisation, smoothing: float) -> Weighting | None:
    """Return the aggregator called ``method``; None for ``fixed``. The settings are those of ``mgda``."""
    if method == "fixed":
        return None
    options = {"normalisation": normalisation, "smoothing": smoothing} if method == "mgda" else {}
    weighting: Weighting = AGGREGATORS.build(method, **options)
    return weighting
