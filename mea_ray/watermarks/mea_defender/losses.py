"""The losses of MEA-Defender as functions of logits: equations 6 to 8, and the contrastive term of its code."""

from __future__ import annotations

from collections.abc import Sequence
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
        gradient: Which side gets a gradient: ``both`` (the equation), ``watermark`` (the clean images' logits are
            constants) or ``sources`` (the mixes' logits are constants).
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


def contrastive(logits: Tensor, labels: Tensor, classes: Sequence[int], margin: float = 1.0) -> Tensor:
    """The authors' contrastive term over consecutive samples of the source and target classes.

    Pairs (k, k + 1) of those samples; .5 [t d^2 + (1 - t) relu(margin - sqrt(d^2 + 1e-9))^2] with t = 1 for equal
    labels and d the distance of the logits; the mean over the pairs is divided by their number once more. Without a
    pair it is 0 (the authors' code stops with an error there).

    Args:
        logits: (N, classes).
        labels: int64 (N,).
        classes: Source and target classes; other samples do not count.
        margin: Distance from which unlike pairs are left alone.
    """
    counted = torch.isin(labels, torch.tensor(classes, device=labels.device))
    logits, labels = logits[counted], labels[counted]
    pairs = len(labels) - 1
    if pairs < 1:
        return logits.sum() * 0
    squared = (logits[1:] - logits[:-1]).square().sum(1)
    like = (labels[1:] == labels[:-1]).float()
    unlike = F.relu(margin - (squared + 1e-9).sqrt()).square()
    return (0.5 * (like * squared + (1 - like) * unlike)).mean() / pairs
