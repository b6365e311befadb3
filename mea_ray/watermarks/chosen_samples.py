"""Samples that were chosen before any suspect was seen: shadow thieves recognise them, null models do not.

They are a part of the key, so that a commitment to the key is one to the choice. Models that chose them say nothing
about them, and are refused as controls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Images
from mea_ray.models.base import ImageModel
from mea_ray.watermarks.base import Key

Positions = npt.NDArray[np.int64]
Votes = npt.NDArray[np.bool_]
LEAST = 30
"""Samples that are chosen at least, where there are as many candidates."""
_SECTION, _IMAGES, _POSITIONS = "chosen", "chosen/images", "chosen/positions"


@dataclass(frozen=True)
class ChosenSamples:
    """The samples that a key is verified with, and how they were chosen.

    Attributes:
        images: uint8 (n, C, H, W), in the random order in which the candidates were drawn.
        positions: The two images that each was mixed of, int64 (n, 2), by position in the owner's validation images;
            None for a scheme that mixes no images.
        candidates: Samples that were chosen from.
        passed: Candidates that passed: no more than n, which is ``LEAST`` at least.
        thieves: Shadow thieves that chose.
        null_models: Null models that chose.
        choosers: What ``body_digest`` gives for each of these models.
    """

    images: Images
    positions: Positions | None
    candidates: int
    passed: int
    thieves: int
    null_models: int
    choosers: tuple[str, ...]

    def first(self, count: int) -> ChosenSamples:
        """Return the first ``count`` samples, or all if there are fewer."""
        positions = None if self.positions is None else self.positions[:count]
        return replace(self, images=self.images[:count], positions=positions)

    def refuse(self, model: nn.Module) -> None:
        """Refuse to judge a model that took part in the choice.

        Raises:
            ConfigError: It did.
        """
        if body_digest(model) in self.choosers:
            raise ConfigError(
                "this model helped to choose the key's samples, so that what it says of them is no evidence; judge "
                "other null models, trained from other seeds"
            )


def select(victim: Votes, thieves: Votes, nulls: Votes, agreement: float) -> tuple[Positions, int]:
    """Choose samples by which models recognise them.

    A candidate passes if the victim recognises it, at least the share ``agreement`` of the thieves does, and no null
    model does. If fewer than ``LEAST`` pass, the closest candidates are added: first those that the victim
    recognises, then by the share of the thieves less that of the null models.

    Args:
        victim: Which candidates the victim recognises, (n,).
        thieves: Which each shadow thief recognises, (t, n).
        nulls: Which each null model recognises, (m, n).
        agreement: In (0, 1].

    Returns:
        Positions of the chosen, int64, in the candidates' order as far as they passed; and how many passed.
    """
    by_thieves, by_nulls = thieves.mean(0), nulls.mean(0)
    passes = victim & (by_thieves >= agreement) & (by_nulls == 0)
    passed = np.flatnonzero(passes)
    closest = np.lexsort((-(by_thieves - by_nulls), ~victim))
    rest = closest[~passes[closest]][: max(0, LEAST - len(passed))]
    return np.concatenate([passed, rest]).astype(np.int64), len(passed)


def with_chosen(key: Key, chosen: ChosenSamples) -> Key:
    """Return the key with its chosen samples."""
    tensors = {**key.tensors, _IMAGES: chosen.images}
    if chosen.positions is not None:
        tensors[_POSITIONS] = chosen.positions
    section = {
        "candidates": chosen.candidates,
        "passed": chosen.passed,
        "thieves": chosen.thieves,
        "null_models": chosen.null_models,
        "choosers": list(chosen.choosers),
    }
    return replace(key, settings={**key.settings, _SECTION: section}, tensors=tensors)


def chosen_of(key: Key) -> ChosenSamples | None:
    """Return a key's chosen samples; None if it is verified with samples that are mixed anew."""
    section: dict[str, Any] | None = key.settings.get(_SECTION)
    if section is None or _IMAGES not in key.tensors:
        return None
    choosers = tuple(section["choosers"])
    return ChosenSamples(key.tensors[_IMAGES], key.tensors.get(_POSITIONS), **{**section, "choosers": choosers})


def chosen_of_all(keys: Sequence[Key]) -> list[ChosenSamples]:
    """Return the chosen samples of several keys; empty unless each has some."""
    chosen = [each for each in map(chosen_of, keys) if each is not None]
    return chosen if len(chosen) == len(keys) else []


def body_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters without its head, which is fitted anew where encoders are read."""
    has_head = isinstance(model, ImageModel) and model.has_features
    head = {id(parameter) for parameter in model.head.parameters()} if has_head else set()  # type: ignore[union-attr]
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) not in head:
            value = np.ascontiguousarray(parameter.detach().cpu().numpy())
            digest.update(f"{name} {value.shape} {value.dtype}".encode())
            digest.update(value.tobytes())
    return digest.hexdigest()
