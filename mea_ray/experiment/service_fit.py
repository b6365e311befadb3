"""Whether a service that somebody else runs takes the thief's images and answers with the experiment's classes."""

from __future__ import annotations

from pathlib import Path

from mea_ray.blackbox.foreign import load_api
from mea_ray.config import BlackBoxConfig
from mea_ray.core.errors import ConfigError


def check_description(settings: BlackBoxConfig, shape: tuple[int, int, int], classes: int | None) -> None:
    """Refuse, before anything is trained, an API whose description does not fit the thief's data; it is not asked.

    Args:
        settings: Where the service is. Without ``api`` only the service itself knows what it takes.
        shape: (channels, height, width) of the thief's images.
        classes: Numbers that an answer must hold; None for any.

    Raises:
        ConfigError: The description cannot be read, or is of other images or classes.
    """
    if settings.api is None:
        return
    api = load_api(Path(settings.api))
    check_fits(settings.url, api.image_shape, len(api.classes), shape, classes)


def check_fits(
    url: str, takes: tuple[int, int, int], answers: int, shape: tuple[int, int, int], classes: int | None
) -> None:
    """Refuse a service of other images or answers than the thief's.

    Args:
        url: The service.
        takes: Shape of the images that it takes.
        answers: Numbers that it answers an image.
        shape: Shape of the thief's images.
        classes: Numbers that an answer must hold; None for any.

    Raises:
        ConfigError: They differ.
    """
    if takes != shape:
        raise ConfigError(
            f"{url} takes images of shape {list(takes)}, the data have {list(shape)}; set data.image_size, or choose "
            "other data"
        )
    if classes is not None and answers != classes:
        raise ConfigError(f"{url} answers {answers} numbers an image, the experiment's victim has {classes}")
