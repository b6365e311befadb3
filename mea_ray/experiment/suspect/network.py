"""A suspect as a network that the verifier can ask: images are brought into its form, answers into logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mea_ray.core.errors import SuspectError
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.experiment.suspect.outputs import Kind, as_logits, kind_of, matched_columns
from mea_ray.models.foreign import Preprocessing, resized

Ask = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
"""float32 images, as the suspect expects them, to its answers, one row per image."""
PROBED = 64
"""Test images that the kind of the answers is read from."""


@dataclass(frozen=True)
class Form:
    """The form in which a suspect is asked and answers.

    Attributes:
        preprocessing: What it expects of an image. Without ``mean`` the values of ``value_range`` go in as they are.
        rows_last: It takes (N, H, W, C), as TensorFlow does, not (N, C, H, W).
        outputs: What it answers with.
        columns: Its column for each of the victim's classes.
        width: Number of its classes.
    """

    preprocessing: Preprocessing
    rows_last: bool
    outputs: Kind
    columns: tuple[int, ...]
    width: int


class SuspectNetwork(nn.Module):
    """A suspect as a network of the victim's classes; implements what ``Verifier.report`` takes.

    Args:
        ask: Asks the suspect.
        form: Its form.
    """

    channels_last = False

    def __init__(self, ask: Ask, form: Form) -> None:
        super().__init__()
        self.ask, self.form = ask, form

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of the victim's classes, for float32 RGB images in [0, 1], (N, C, H, W)."""
        answers = self.ask(arranged(x, self.form.preprocessing, rows_last=self.form.rows_last))
        logits = as_logits(answers, self.form.outputs, self.form.width)
        return torch.from_numpy(logits[:, list(self.form.columns)])


def arranged(x: Tensor, given: Preprocessing, *, rows_last: bool = False) -> npt.NDArray[np.float32]:
    """Bring float32 RGB images in [0, 1], (N, C, H, W), into the form that a suspect expects."""
    x = resized(x, given.size)
    if given.channel_order == "BGR":
        x = x.flip(1)
    low, high = given.value_range
    x = x * (high - low) + low
    if given.mean is not None and given.deviation is not None:
        mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in (given.mean, given.deviation))
        x = (x - mean) / deviation
    if rows_last:
        x = x.permute(0, 2, 3, 1)
    return np.ascontiguousarray(x.numpy(), dtype=np.float32)


def fitted(
    given: Preprocessing, shape: tuple[int, int, int], expected: list[int | None] | None
) -> tuple[Preprocessing, bool]:
    """Fit the form of an image to the input shape that a file declares.

    Args:
        given: What the user declared.
        shape: (channels, height, width) of the victim's images.
        expected: The declared shape with its batch, None where a side is free; None if nothing is declared.

    Returns:
        The preprocessing, with the declared size if the user named none, and whether channels come last.

    Raises:
        SuspectError: The input takes no images of so many channels.
    """
    if expected is None or len(expected) != 4:
        if expected is not None:
            raise SuspectError(f"the suspect's input has shape {expected}; images are (N, C, H, W) or (N, H, W, C)")
        return given, False
    channels = shape[0]
    first, last = expected[1], expected[3]
    rows_last = first != channels and last == channels
    if not rows_last and first not in {None, channels}:
        raise SuspectError(
            f"the suspect takes {first} channels and the victim's images have {channels}; they cannot be compared"
        )
    height, width = expected[1:3] if rows_last else expected[2:4]
    if given.size is None and height is not None and width is not None and (height, width) != shape[1:]:
        given = given.changed(size=(height, width))
    return given, rows_last


def find_form(
    ask: Ask,
    test: ImageSet,
    *,
    preprocessing: Preprocessing,
    rows_last: bool,
    outputs: Kind | None,
    columns: tuple[int, ...] | None,
    match: bool,
) -> tuple[Form, bool]:
    """Ask a few test images, and say what the answers are.

    Args:
        ask: Asks the suspect.
        test: The victim's test images.
        preprocessing: What the suspect expects.
        rows_last: See ``Form``.
        outputs: What the user says the answers are; None to find out.
        columns: The suspect's column for each of the victim's classes; None for the same order.
        match: Match the classes by the answers to all test images instead.

    Returns:
        The form, and whether the order of the classes was assumed.

    Raises:
        SuspectError: The answers cannot be understood, or the suspect has another number of classes.
    """
    first = test.images[:: max(1, len(test) // PROBED)][:PROBED]
    x = torch.from_numpy(first.astype(np.float32) / 255)
    answers = ask(arranged(x, preprocessing, rows_last=rows_last))
    kind = outputs if outputs is not None else kind_of(answers)
    width = answers.shape[1] if answers.ndim == 2 and answers.shape[1] > 1 else test.classes
    if kind == "labels" and columns is not None:
        width = max(width, max(columns) + 1)
    form = Form(preprocessing, rows_last, kind, columns or tuple(range(width)), width)
    if match:
        predicted = metrics.predictions(SuspectNetwork(ask, replace(form, columns=tuple(range(width)))), test.images)
        return replace(form, columns=matched_columns(predicted, test.labels, test.classes, width)), False
    if columns is None and width != test.classes:
        raise SuspectError(
            f"the suspect has {width} classes and the victim {test.classes}; say which is which with --classes FILE "
            "(NAME: COLUMN for each class of the victim's), or --classes match"
        )
    if columns is not None and max(columns) >= width:
        raise SuspectError(f"--classes names column {max(columns)}, but the suspect answers with {width} columns")
    return form, columns is None
