"""The losses of MEA-Defender, each a function of logits: equations 6 to 8 of the paper, and two terms beside it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ComGradient = Literal["both", "watermark", "sources"]
ComDirection = Literal["watermark_source", "source_watermark"]


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(softmax(first) || softmax(second)), mean over samples; logits (N, classes), result in nats."""
    return F.kl_div(F.log_softmax(second, dim=1), F.log_softmax(first, dim=1), reduction="batchmean", log_target=True)


def combination(
    watermark: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    direction: ComDirection = "watermark_source",
    gradient: ComGradient = "both",
) -> Tensor:
    """L_com, equation 6: KL(f(x_wm) || f(x_si)) + KL(f(x_wm) || f(x_sj)), mean over pairs.

    Args:
        watermark: Logits (N, classes) of the mixes.
        first: Logits (N, classes) of the clean images of s_i that were mixed, pair by pair.
        second: The same for s_j.
        direction: ``watermark_source`` is the equation; ``source_watermark`` swaps the arguments of both divergences.
        gradient: Which side moves: ``both`` (the equation), ``watermark`` (the clean images' answers are constants) or
            ``sources`` (the mixes' answers are).
    """
    if gradient == "watermark":
        first, second = first.detach(), second.detach()
    elif gradient == "sources":
        watermark = watermark.detach()
    if direction == "watermark_source":
        return kl(watermark, first) + kl(watermark, second)
    return kl(first, watermark) + kl(second, watermark)


def verification(watermark: Tensor, target: int) -> Tensor:
    """L_ver, equation 7: mean cross-entropy of the mixes (logits (N, classes)) with the target class."""
    return F.cross_entropy(watermark, torch.full((len(watermark),), target, device=watermark.device))


def evasion(adverse: Tensor, labels: Tensor) -> Tensor:
    """L_eva, equation 8: mean cross-entropy of differently mixed samples with a source class.

    Args:
        adverse: Logits (N, classes).
        labels: int64 (N,), or float (N, classes) for soft labels.
    """
    return F.cross_entropy(adverse, labels)


def soft_labels(labels: Tensor, target: int, rho: float, classes: int) -> Tensor:
    """(1 - rho) on the own label and rho on the target: float32 (N, classes) of int64 labels (N,)."""
    soft = F.one_hot(labels, classes).float() * (1 - rho)
    soft[:, target] += rho
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


def exclusion(clean: Tensor, labels: Tensor, source_classes: tuple[int, int], margin: float) -> Tensor:
    """Exclusion term: mean of relu(margin - (z_own - z_other)) over clean source samples.

    z_other is the logit of the *other* source class: a clean image of one source class is to rule out the other.

    Args:
        clean: Logits (N, classes) of clean source samples.
        labels: int64 (N,), each one of ``source_classes``.
        source_classes: The two source classes.
        margin: Least difference of the two logits.
    """
    other = sum(source_classes) - labels
    gap = clean.gather(1, labels[:, None]) - clean.gather(1, other[:, None])
    return F.relu(margin - gap).mean()
