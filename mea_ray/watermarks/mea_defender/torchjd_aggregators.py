"""The aggregators of torchjd that need no further package, each a component by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torchjd.aggregation
from scipy.optimize import nnls
from torch import Tensor
from torchjd.linalg import DualConeProjector

from mea_ray.watermarks.mea_defender.weighting import Weighting

GRAD_VAC_STATE = ("_phi_t", "_state_key")
"""State of torchjd's GradVac, which torchjd cannot save itself; no other aggregator here has any."""


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
    """Base of the aggregators of torchjd: ``make`` builds one, which maps gradients (K, P) to one (P,)."""

    make: ClassVar[Callable[[], Callable[[Tensor], Tensor]]]

    def __init__(self) -> None:
        self.aggregator = type(self).make()

    def aggregate(self, gradients: Tensor, values: Sequence[float]) -> Tensor:
        """Return the aggregated gradient."""
        return self.aggregator(gradients)

    def memory(self) -> dict[str, Any]:
        """Return the state of an aggregator that has one."""
        inner = getattr(self.aggregator, "gramian_weighting", None)
        return {name: getattr(inner, name) for name in GRAD_VAC_STATE if hasattr(inner, name)}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """See the base class."""
        inner = getattr(self.aggregator, "gramian_weighting", None)
        for name, value in memory.items():
            setattr(inner, name, value)


class AlignedMtl(TorchJD):
    """Aligned-MTL (Senushkin et al., CVPR 2023): the principal components of the gradients get one length.

    Choose it where the gradients of the losses differ much in length.
    """

    make = torchjd.aggregation.AlignedMTL


class ConFig(TorchJD):
    """ConFIG (Liu et al., ICLR 2025): a direction at the same angle to all gradients.

    Choose it where all losses are to fall at the same relative rate.
    """

    make = torchjd.aggregation.ConFIG


class DualProj(TorchJD):
    """The mean gradient, projected onto the dual cone of the gradients (Lopez-Paz and Ranzato, NeurIPS 2017).

    Choose it where no loss may rise, and the mean comes close to that.
    """

    make = partial(torchjd.aggregation.DualProj, projector=NonNegativeProjector())


class GradDrop(TorchJD):
    """GradDrop (Chen et al., NeurIPS 2020): each coordinate keeps one sign, drawn by how far the gradients agree.

    Choose it to escape a compromise between the losses by chance.
    """

    make = torchjd.aggregation.GradDrop


class GradVac(TorchJD):
    """GradVac (Wang et al., ICLR 2021): gradients are turned towards the angles that they usually have.

    Choose it in place of pcgrad, where losses that agree should share more.
    """

    make = torchjd.aggregation.GradVac


class ImtlG(TorchJD):
    """IMTL-G (Liu et al., ICLR 2021): a sum whose projections onto all gradients are equal.

    Choose it where the size of a loss must not count.
    """

    make = torchjd.aggregation.IMTLG


class MeanGradient(TorchJD):
    """The mean of the gradients.

    Choose it as a baseline for the others: the sum at a lower rate.
    """

    make = torchjd.aggregation.Mean


class PcGrad(TorchJD):
    """PCGrad (Yu et al., NeurIPS 2020): each gradient loses its component that conflicts with another one.

    Choose it where two losses pull in opposite directions.
    """

    make = torchjd.aggregation.PCGrad


class RandomWeights(TorchJD):
    """Random weights in each step (Lin et al., TMLR 2022).

    Choose it as a baseline for weights that are computed.
    """

    make = torchjd.aggregation.Random


class SumOfGradients(TorchJD):
    """The sum of the gradients.

    Choose it to check the others: it is what fixed weights give.
    """

    make = torchjd.aggregation.Sum


class UpGrad(TorchJD):
    """UPGrad (Quinton and Rey, 2024): the mean of the gradients, each projected onto the dual cone of all.

    Choose it where no loss may rise in any step.
    """

    make = partial(torchjd.aggregation.UPGrad, projector=NonNegativeProjector())
