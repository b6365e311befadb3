"""A search for a smooth signal in soft answers, by someone who knows that there may be one but nothing of the key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Answers, Images
from mea_ray.detection.base import Detection, DetectionReport
from mea_ray.detection.leaning import readable
from mea_ray.evaluation import metrics
from mea_ray.evaluation.projections import flat, principal_components, residual
from mea_ray.models.base import ImageModel

Wide = npt.NDArray[np.float64]
COMPONENTS = (8, 32)
"""Numbers of principal components that are tried, each of the images and of the means of images and mirror images."""
STARTS, REFINED, STEPS = 2000, 10, 60
"""Frequencies that are tried at random, those of them that gradient ascent refines, and its steps."""
SLOWEST, FASTEST = 0.3, 6.5
"""Range of the frequencies, in radians per standard deviation: from a period in 20 deviations to one in each."""
STARTS_AT_ONCE = 250
LEAST = 100
"""Fewest answers that are searched."""


@dataclass(frozen=True)
class FoundSignal:
    """A wave along one direction of the images, with its own amplitude and phase for each class.

    Attributes:
        axes: Whitened principal components, float64 (r, pixels).
        centre: Their coordinates of the mean image, float64 (r,).
        frequency: Radians per standard deviation along each component, float64 (r,).
        weights: Of cosine, sine and 1 for each class, float64 (3, K).
        explained: Fraction of the variance of the log-probabilities off the top class that the signal explained in
            answers that it was not fitted on; below 0 if it predicts worse than the mean.
    """

    axes: Wide
    centre: Wide
    frequency: Wide
    weights: Wide
    explained: float

    def at(self, images: Images) -> Wide:
        """Return the signal in each image's log-probabilities, float64 (N, K).

        Args:
            images: uint8 (N, C, H, W), of the shape that it was found in.
        """
        angles = (flat(images) @ self.axes.T - self.centre) @ self.frequency
        signal: Wide = _waves(angles)[:, :2] @ self.weights[:2]
        return signal


def find_signal(answers: Answers, images: Images, seed: int) -> FoundSignal | None:
    """Search answers for the wave that explains most of what they say beyond the top class.

    Frequencies are tried at random and refined by gradient ascent on the explained variance; amplitudes and phases
    follow by least squares. Three quarters of the answers choose among the numbers of components, by the other quarter.

    Args:
        answers: float32 (N, K), probabilities.
        images: The images that were answered, uint8 (N, C, H, W).
        seed: Of the frequencies that are tried.

    Returns:
        The signal, fitted on all answers; None if there are fewer than 100, if they name classes only, or if all images
        are equal.
    """
    if len(answers) < LEAST or not readable(answers):
        return None
    left, part = residual(np.log(np.maximum(answers, 1e-12))), 3 * len(answers) // 4
    best: tuple[float, dict[str, Wide], Wide] | None = None
    rows = flat(images)
    for components in _component_sets(images, seed):
        places = rows @ components["axes"].T - components["centre"]
        frequency = _search(places[:part], left[:part], seed)
        waves = _waves(places @ frequency)
        explained = _explained(waves[part:] @ _fit(waves[:part], left[:part]), left[part:])
        if best is None or explained > best[0]:
            best = (explained, components, places)
    if best is None:
        return None
    explained, components, places = best
    frequency = _search(places, left, seed)
    weights = _fit(_waves(places @ frequency), left)
    return FoundSignal(components["axes"], components["centre"], frequency, weights, explained)


def _component_sets(images: Images, seed: int) -> Iterator[dict[str, Wide]]:
    for count in COMPONENTS:
        for symmetric in (False, True):
            try:
                yield principal_components(images, count, derive(seed, "components"), symmetric=symmetric)
            except ConfigError:  # all images are equal, so no answer depends on them
                return


def _waves(angles: Wide) -> Wide:
    return np.stack([np.cos(angles), np.sin(angles), np.ones_like(angles)], axis=1)


def _fit(waves: Wide, left: Wide) -> Wide:
    """Return least-squares weights of each class, float64 (3, K), over the images of which it is not the answer."""
    weights = np.zeros((3, left.shape[1]))
    for label, column in enumerate(left.T):
        other = column != 0
        if other.sum() > waves.shape[1]:
            weights[:, label] = np.linalg.lstsq(waves[other], column[other], rcond=None)[0]
    return weights


def _explained(predicted: Wide, left: Wide) -> float:
    other = left != 0
    return 1 - float(((left - predicted)[other] ** 2).sum() / max(float((left[other] ** 2).sum()), 1e-12))


def _search(places: Wide, left: Wide, seed: int) -> Wide:
    """Return the frequency, float64 (r,), whose cosine and sine explain most of ``left``."""
    generator = torch.Generator().manual_seed(derive(seed, "frequencies") % 2**63)
    where, target = torch.from_numpy(places), torch.from_numpy(left)
    tried = torch.randn(STARTS, places.shape[1], generator=generator, dtype=torch.float64)
    tried /= tried.norm(dim=1, keepdim=True)
    tried *= SLOWEST + (FASTEST - SLOWEST) * torch.rand(STARTS, 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        explained = torch.cat([_explained_by(part, where, target) for part in torch.split(tried, STARTS_AT_ONCE)])
    chosen = tried[explained.argsort(descending=True)[:REFINED]].clone().requires_grad_()
    ascent = torch.optim.Adam([chosen], lr=0.05)
    for _ in range(STEPS):
        ascent.zero_grad()
        (-_explained_by(chosen, where, target).sum()).backward()  # type: ignore[no-untyped-call]
        ascent.step()
    with torch.no_grad():
        frequency: Wide = chosen[int(_explained_by(chosen, where, target).argmax())].numpy()
    return frequency


def _explained_by(frequencies: Tensor, places: Tensor, left: Tensor) -> Tensor:
    """Return the part of the variance that the waves of each frequency explain, float64 (S,).

    For each class this is a regression on cosine, sine and 1 over the images of which it is not the answer, in closed
    form: the sums over images are all that is needed.
    """
    angles = places @ frequencies.T
    cosine, sine, other = torch.cos(angles).T, torch.sin(angles).T, (left != 0).double()
    count = other.sum(0).clamp(min=1)
    to_cosine, to_sine = cosine @ left, sine @ left  # ``left`` has mean 0 in each class
    mean_cosine, mean_sine = cosine @ other / count, sine @ other / count
    cosines = cosine**2 @ other - count * mean_cosine**2
    sines = sine**2 @ other - count * mean_sine**2
    both = (cosine * sine) @ other - count * mean_cosine * mean_sine
    determinant = (cosines * sines - both**2).clamp(min=1e-6)
    gained = sines * to_cosine**2 - 2 * both * to_cosine * to_sine + cosines * to_sine**2
    return (gained / determinant).sum(1) / (left**2).sum().clamp(min=1e-12)


class SignalSearch(Detection):
    """A search for a wave along one direction of the images in the model's soft answers.

    Choose it to see whether a signal such as that of `cosine` can be read from a stolen model.

    Numbers: ``explained``, the fraction of the variance of the log-probabilities off the top class that the best wave
    explains on a quarter of the answers that it was not fitted on. Compare it with that of the null model. For the
    service's answers, where the owner's key is known, the search is part of every result with such a mark.

    Args:
        answers: Most answers that are used.
    """

    name = "signal_search"
    least_images = LEAST

    def __init__(self, *, answers: Annotated[int, Field(ge=LEAST)] = 1000) -> None:
        self.answers = answers

    def inspect(self, model: ImageModel, clean: Images, samples: Images | None, seed: int) -> DetectionReport:
        """Return how much the best wave explains."""
        images = clean[: self.answers]
        signal = find_signal(metrics.probabilities(model, images), images, seed)
        return DetectionReport((), (), {} if signal is None else {"explained": signal.explained})
