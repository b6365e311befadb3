"""Checks whether someone else's service takes the thief's images and answers with the experiment's classes."""

from __future__ import annotations

from pathlib import Path

from mea_ray.blackbox.foreign import load_api
from mea_ray.config import BlackBoxConfig
from mea_ray.core.errors import ConfigError


def check_description(settings: BlackBoxConfig, shape: tuple[int, int, int], classes: int | None) -> None:
    """Reject an API whose description does not fit the thief's data, before anything is trained and without a query.

    Args:
        settings: The service. Without ``api`` nothing is checked here: only the service knows what it takes.
        shape: (channels, height, width) of the thief's images.
        classes: Required length of an answer; None for any.

    Raises:
        ConfigError: The description cannot be read, or specifies other images or classes.
    """
    if settings.api is None:
        return
    api = load_api(Path(settings.api))
    check_fits(settings.url, api.image_shape, len(api.classes), shape, classes)


def check_fits(
    url: str, takes: tuple[int, int, int], answers: int, shape: tuple[int, int, int], classes: int | None
) -> None:
    """Reject a service whose images or answers differ from the thief's.

    Args:
        url: The service.
        takes: Shape of the images that it takes.
        answers: Length of its answer to one image.
        shape: Shape of the thief's images.
        classes: Required length of an answer; None for any.

    Raises:
        ConfigError: They differ.
    """
    if takes != shape:
        raise ConfigError(
            f"{url} takes images of shape {list(takes)}, the data have {list(shape)}; set data.image_size, or choose "
            "other data"
        )
    if classes is not None and answers != classes:
        raise ConfigError(f"{url} answers {answers} numbers per image, the experiment's victim has {classes}")
