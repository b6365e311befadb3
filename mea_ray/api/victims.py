"""The owner's side: put a mark into a model, train null models, judge a suspect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.api import progress as bars
from mea_ray.api.settings import Component, Labelled, dataset, experiment, network
from mea_ray.config import ExperimentConfig, build
from mea_ray.core.types import Dataset
from mea_ray.experiment.suspect.judging import Terms, Verdict, verify_suspect
from mea_ray.experiment.suspect.network import Ask
from mea_ray.experiment.victim import Victim
from mea_ray.experiment.victim.make import make_victim


def watermark(
    data: Component | Dataset | tuple[Labelled, Labelled] | None = None,
    model: str | Mapping[str, Any] | type[nn.Module] | None = None,
    *,
    scheme: Component | None = None,
    training: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    config: ExperimentConfig | str | Path | Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    name: str = "victim",
    progress: bool = True,
) -> Victim:
    """Train a watermarked classifier, or put a mark into a trained one.

    Args:
        data: A dataset by name, a ``Dataset``, or a training and a test set in torchvision's style, whose images are
            PIL images or values in [0, 1].
        model: A network by name, or an importable subclass of ``nn.Module`` that returns logits.
        scheme: The watermark by name or with its options.
        training: Settings of the training, e.g. ``{"epochs": 20}``.
        weights: File with the trained classifier's weights.
        class_names: Names of the classes, for data in torchvision's style.
        config: All other settings.
        storage: Folder for trained models; the same call finds its victim there.
        name: Name of the victim until it is saved.
        progress: Show a bar.

    Raises:
        ConfigError: The settings do not fit; nothing was trained.
        DataError: The data cannot be read.
    """
    settings = experiment(config)
    place = str(settings.storage if storage is None else storage)
    victim: dict[str, Any] = {}
    if model is not None:
        victim["model"] = network(model)
    if scheme is not None:
        victim["watermark"] = scheme
    if training is not None:
        victim["training"] = dict(training)
    if weights is not None:
        victim["weights"] = str(weights)
    changes: dict[str, Any] = {"storage": place, "victim": victim}
    if data is not None:
        changes["data"] = dataset(data, place, class_names)
    settings = build(ExperimentConfig, settings.over(changes))
    with bars.bar(progress) as update:
        return make_victim(settings, name, on_epoch=bars.epochs(update))


def nulls(
    victim: Victim,
    count: int = 20,
    *,
    stolen: int = 0,
    config: ExperimentConfig | None = None,
    address: str | None = None,
    progress: bool = True,
) -> Victim:
    """Train and measure null models of a victim on Ray; see ``calibration.nulls.make_nulls``.

    Args:
        victim: A saved victim.
        count: Total number of null models.
        stolen: How many of them to steal as well.
        config: The experiment, with another thief; None takes the victim's.
        address: Ray cluster; None starts one on this machine.
        progress: Show a bar.

    Returns:
        The victim with the cost of its mark on its card.
    """
    from mea_ray.calibration.nulls import make_nulls

    with bars.bar(progress) as update:

        def on_null(record: object, done: int, of: int) -> None:
            update("null models", done, of)

        return make_nulls(victim, count, stolen=stolen, config=config, address=address, on_null=on_null)


def verify(
    victim: Victim | str | Path,
    suspect: str | Path | nn.Module | Ask,
    terms: Terms | None = None,
    *,
    progress: bool = True,
) -> Verdict:
    """Judge a suspect with a victim's key.

    Args:
        victim: A saved victim with null models, or its folder.
        suspect: A file (ONNX, torch.export, TorchScript, weights), a URL, a network, or a function of float32 images
            (N, C, H, W) that returns a row of class scores or a label for each.
        terms: What is known about the suspect.
        progress: Show the number of images sent.

    Raises:
        ConfigError: There are no null models yet, or the victim cannot be verified in this way.
        SuspectError: The suspect cannot be loaded or queried, or its outputs cannot be interpreted.
        DataError: The victim's data have changed.
    """
    owned = victim if isinstance(victim, Victim) else Victim.load(victim)
    terms = terms or Terms()
    asked = _asking(suspect) if isinstance(suspect, nn.Module) else suspect
    with bars.bar(progress) as update:
        update("opening the suspect", 0, None)
        return verify_suspect(
            owned,
            str(asked) if isinstance(asked, Path) else asked,
            terms,
            on_asked=lambda images: update(f"querying the suspect, {images:,} images so far", 0, None),
        )


def _asking(model: nn.Module) -> Ask:
    """Return a function that queries a network in eval mode, on its own device."""

    def ask(images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        where = next((each.device for each in model.parameters()), torch.device("cpu"))
        before = model.training
        model.eval()
        try:
            with torch.inference_mode():
                answers: torch.Tensor = model(torch.from_numpy(images).to(where))
        finally:
            model.train(before)
        return answers.float().cpu().numpy()

    return ask
