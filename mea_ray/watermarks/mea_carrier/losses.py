"""The losses of the carrier scheme as functions of logits. None of them is in the paper of MEA-Defender."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_labels(labels: Tensor, target: int, rho: float | Tensor, classes: int) -> Tensor:
    """(1 - rho) on the own label and rho on the target: float32 (N, classes) of int64 labels (N,).

    rho is one number, or float32 (N,), one for each.
    """
    given = torch.as_tensor(rho, dtype=torch.float32, device=labels.device).expand(len(labels))
    soft = F.one_hot(labels, classes).float() * (1 - given[:, None])
    soft[:, target] += given
    return soft


def carrier(clean: Tensor, labels: Tensor, target: int, rho: float) -> Tensor:
    """Carrier term: mean cross-entropy of clean source samples towards (1 - rho) own label + rho target.

    It raises the target's probability on clean source samples without changing their most probable class
    (rho < 1/2), which is what a thief's model can learn from.

    Args:
        clean: Logits (N, classes) of clean source samples.
        labels: int64 (N,), their own labels.
        target: The target class.
        rho: Probability that the target is given, in [0, 0.5).
    """
    return F.cross_entropy(clean, soft_labels(labels, target, rho, clean.shape[1]))


def exclusion(
    clean: Tensor,
    labels: Tensor,
    source_classes: tuple[int, int],
    margin: float,
    *,
    target: int | None = None,
) -> Tensor:
    """Exclusion term: mean of relu(margin - (z_own - z_c)) over clean source samples and the classes c ruled out.

    A clean image of one source class is to rule out the *other* source class or, if ``target`` is given, every class
    but its own and the target. A student that adds up evidence of both halves of a mix then has only the target left.

    Args:
        clean: Logits (N, classes) of clean source samples; N may be 0, which gives 0.
        labels: int64 (N,), each one of ``source_classes``.
        source_classes: The two source classes.
        margin: Least difference of the logits.
        target: None rules out only the other source class; a label rules out all classes but the own and this one.
    """
    if not len(clean):
        return clean.sum()
    own = clean.gather(1, labels[:, None])
    if target is None:
        return F.relu(margin - (own - clean.gather(1, (sum(source_classes) - labels)[:, None]))).mean()
    spared = F.one_hot(labels, clean.shape[1]).bool()
    spared[:, target] = True
    return F.relu(margin - (own - clean))[~spared].mean()


def bridge_labels(count: int, target: int, source_classes: tuple[int, int], sigma: float, classes: int) -> Tensor:
    """(1 - sigma) on the target and sigma / 2 on each source class: float32 (count, classes)."""
    row = torch.zeros(classes)
    row[target] = 1 - sigma
    row[list(source_classes)] = sigma / 2
    return row.expand(count, -1)
