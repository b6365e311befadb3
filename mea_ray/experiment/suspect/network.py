"""A suspect as a network for the verifier: images are converted to its input format, answers to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mea_ray.core.errors import OverBudget, SuspectError
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.experiment.suspect.outputs import Kind, as_logits, as_rows, kind_of, matched_columns, spread_unnamed
from mea_ray.models.foreign import Preprocessing, resized

Ask = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
"""Maps float32 images in the suspect's input format to its answers, one row per image."""
PROBED = 64
"""Number of test images from which the type of the answers is inferred."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey, ITU-R BT.601, as in Pillow."""


class ExpectedInput(NamedTuple):
    """The input format of a suspect.

    Attributes:
        preprocessing: Its preprocessing. Without ``mean``, values in ``value_range`` are passed unchanged.
        rows_last: Whether it takes (N, H, W, C), as TensorFlow does, instead of (N, C, H, W).
        channels: Number of its channels; None for the victim's. Grey images are repeated to three channels, and colour
            images converted to grey.
    """

    preprocessing: Preprocessing
    rows_last: bool = False
    channels: int | None = None


def counted(ask: Ask, on_asked: Callable[[int], None]) -> Ask:
    """Wrap ``ask`` with a listener that is called with the number of images queried so far.

    Raises:
        SuspectError: Raised by the returned function: the suspect's API grants no more images.
    """
    asked = 0

    def asking(images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        nonlocal asked
        try:
            answers = ask(images)
        except OverBudget as error:
            raise SuspectError(
                f"the suspect's API has answered {asked:,} images, and {error.remaining:,} of the key's budget of "
                f"{error.budget:,} are left, too few for the next {error.asked:,}; have its owner raise the budget, "
                "then repeat the command: a service of `mea-ray serve` charges no image of it twice"
            ) from None
        asked += len(images)
        on_asked(asked)
        return answers

    return asking


@dataclass(frozen=True)
class Form:
    """The input and output format of a suspect.

    Attributes:
        taken: The input format.
        outputs: What it answers with.
        columns: Its column for each of the victim's classes.
        width: Number of its classes.
    """

    taken: ExpectedInput
    outputs: Kind
    columns: tuple[int, ...]
    width: int


class SuspectNetwork(nn.Module):
    """A suspect as a network of the victim's classes; implements what ``Verifier.report`` takes.

    Args:
        ask: Queries the suspect.
        form: Its input and output format.
    """

    channels_last = False

    def __init__(self, ask: Ask, form: Form) -> None:
        super().__init__()
        self.ask, self.form = ask, form

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of the victim's classes, for float32 RGB images in [0, 1], (N, C, H, W)."""
        logits = as_logits(self.ask(arranged(x, self.form.taken)), self.form.outputs, self.form.width)
        chosen = logits[:, list(self.form.columns)]
        return torch.from_numpy(spread_unnamed(chosen) if self.form.outputs in {"labels", "top_k"} else chosen)


def arranged(x: Tensor, taken: ExpectedInput) -> npt.NDArray[np.float32]:
    """Convert float32 RGB images in [0, 1], (N, C, H, W), to a suspect's input format."""
    given = taken.preprocessing
    x = resized(_in_channels(x, taken.channels), given.size)
    if given.channel_order == "BGR":
        x = x.flip(1)
    low, high = given.value_range
    x = x * (high - low) + low
    if given.mean is not None and given.deviation is not None:
        mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in (given.mean, given.deviation))
        x = (x - mean) / deviation
    if taken.rows_last:
        x = x.permute(0, 2, 3, 1)
    return np.ascontiguousarray(x.numpy(), dtype=np.float32)


def _in_channels(x: Tensor, channels: int | None) -> Tensor:
    if channels is None or x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1)
    return (x * torch.tensor(LUMINANCE).view(-1, 1, 1)).sum(1, keepdim=True)


def fitted(
    given: Preprocessing,
    shape: tuple[int, int, int],
    expected: list[int | None] | None,
    *,
    whole_numbers: bool = False,
) -> ExpectedInput:
    """Adapt the input format to the input that a file declares.

    Args:
        given: The user's declaration.
        shape: (channels, height, width) of the victim's images.
        expected: The declared shape, including the batch, with None for free dimensions; None if nothing is declared.
        whole_numbers: Whether it takes integers from 0 to 255.

    Returns:
        The suspect's input format: the declared size if the user gave none, and the value range of integers.

    Raises:
        SuspectError: The input is not an image, or the victim's images cannot be converted to its number of channels.
    """
    if whole_numbers:
        given = _in_whole_numbers(given)
    if expected is None:
        return ExpectedInput(given)
    if len(expected) != 4:
        raise SuspectError(
            f"the suspect's input has shape {expected}; images are (N, C, H, W) or (N, H, W, C): write a "
            "package.module:function that converts them"
        )
    channels = shape[0]
    first, last = expected[1], expected[3]
    rows_last = _channels_last(channels, first, last)
    wanted = last if rows_last else first
    if wanted is not None and wanted != channels and {wanted, channels} != {1, 3}:
        raise SuspectError(
            f"the suspect takes {wanted} channels and the victim's images have {channels}; only grey and RGB images "
            "can be converted into each other: write a package.module:function that does it"
        )
    height, width = expected[1:3] if rows_last else expected[2:4]
    if given.size is None and height is not None and width is not None and (height, width) != shape[1:]:
        given = given.changed(size=(height, width))
    return ExpectedInput(given, rows_last, None if wanted == channels else wanted)


def _channels_last(channels: int, first: int | None, last: int | None) -> bool:
    """Return whether the channels are an input's last dimension: the one of both that can be a number of channels."""
    if first in {None, channels}:
        return first is None and last == channels
    return last == channels or (first not in {1, 3} and last in {1, 3})


def _in_whole_numbers(given: Preprocessing) -> Preprocessing:
    """Return the preprocessing of an integer input: 0 to 255 unless the user sets it.

    Raises:
        SuspectError: The user's mean or deviation cannot be applied to integers.
    """
    if given.mean is None:
        return given.changed(value_range=(0.0, 255.0), mean=(0.0,), deviation=(1.0,))
    if set(given.mean) != {0.0} or given.deviation is None or set(given.deviation) != {1.0}:
        raise SuspectError(
            f"the suspect takes whole numbers, so mean {list(given.mean)} and deviation "
            f"{list(given.deviation or ())} cannot be applied; leave them out of --preprocessing"
        )
    return given


def find_form(
    ask: Ask,
    test: ImageSet,
    *,
    taken: ExpectedInput,
    outputs: Kind | None,
    columns: tuple[int, ...] | None,
    match: bool,
) -> tuple[Form, bool]:
    """Query a few test images, and infer the format of the answers.

    Args:
        ask: Queries the suspect.
        test: The victim's test images.
        taken: The suspect's input format.
        outputs: The user's declaration of the answers' type; None detects it.
        columns: The suspect's column for each of the victim's classes; None for the same order.
        match: Whether to match the classes by the answers to all test images instead.

    Returns:
        The format, and whether the order of the classes was assumed.

    Raises:
        SuspectError: The answers cannot be interpreted, or the suspect has another number of classes.
    """
    first = test.images[:: max(1, len(test) // PROBED)][:PROBED]
    answers = as_rows(ask(arranged(torch.from_numpy(first.astype(np.float32) / 255), taken)))
    kind = outputs if outputs is not None else kind_of(answers)
    width = answers.shape[1] if answers.ndim == 2 and answers.shape[1] > 1 else test.classes
    if kind == "labels" and answers.ndim == 1:  # labels do not tell the number of classes
        named = answers if not match else _labels(ask, test, taken)
        width = max(width, 1 + int(named.max()), 1 + max(columns or (0,)))
    form = Form(taken, kind, columns or tuple(range(width)), width)
    if match:
        predicted = metrics.predictions(SuspectNetwork(ask, replace(form, columns=tuple(range(width)))), test.images)
        return replace(form, columns=matched_columns(predicted, test.labels, test.classes, width)), False
    if columns is None and width != test.classes:
        raise SuspectError(
            f"the suspect has {width} classes and the victim {test.classes}; map them with --classes FILE "
            "(NAME: COLUMN for each class of the victim's), or --classes match"
        )
    if columns is not None and max(columns) >= width:
        raise SuspectError(f"--classes names column {max(columns)}, but the suspect answers with {width} columns")
    return form, columns is None


def _labels(ask: Ask, test: ImageSet, taken: ExpectedInput) -> npt.NDArray[Any]:
    """Return a suspect's labels for all test images."""
    images = (torch.from_numpy(test.images[at : at + 256].astype(np.float32) / 255) for at in range(0, len(test), 256))
    return np.concatenate([as_rows(ask(arranged(each, taken))) for each in images])
