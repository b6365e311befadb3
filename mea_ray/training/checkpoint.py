"""Networks on disk: weights as safetensors, everything else as JSON. Loading a file can never run code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.storage.files import patiently, write_whole

if TYPE_CHECKING:
    from mea_ray.models.base import ImageModel

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
SCHEMA_VERSION = 1


def save_model(folder: Path, model: ImageModel, info: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` and ``model.json`` into a folder, which is made if it is missing.

    Each file is written aside and renamed, the JSON last: a process that sees the JSON sees the weights that it
    describes, and can check their digest.

    Args:
        folder: Where to write.
        model: A network from ``build_model`` (its ``spec`` is stored), on any device.
        info: More about it, plain JSON values.

    Raises:
        ArtifactError: The model has no ``spec``.
    """
    spec = getattr(model, "spec", None)
    if spec is None:
        raise ArtifactError(f"{type(model).__name__} has no spec to be built again from; build it with build_model")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    weights = save_tensors(state)
    body = {"schema_version": SCHEMA_VERSION, "sha256": hashlib.sha256(weights).hexdigest(), "spec": spec}
    description = json.dumps({**body, "info": dict(info)}, indent=2, sort_keys=True)
    write_whole(folder / WEIGHTS, weights)
    write_whole(folder / DESCRIPTION, description)


def weights_digest(model: ImageModel) -> str:
    """Return the SHA-256 of a model's weights as ``save_model`` would write them, 64 hexadecimal digits."""
    return hashlib.sha256(_content(model)).hexdigest()


def weights_secret(model: ImageModel) -> bytes:
    """Return 32 secret bytes that only a holder of the model's weights can compute.

    They do not follow from ``weights_digest``, which is published in results and cards.
    """
    return hashlib.sha256(b"secret of\n" + _content(model)).digest()


def _content(model: ImageModel) -> bytes:
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content: bytes = save_tensors(state)
    return content


def check_model(folder: Path) -> str:
    """Compare a folder's weights with their checksum, without building the network.

    Returns:
        The checksum, SHA-256.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    try:
        weights = patiently((folder / WEIGHTS).read_bytes, folder / WEIGHTS)
        digest = json.loads(patiently((folder / DESCRIPTION).read_bytes, folder / DESCRIPTION))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder} holds no readable model: {error}") from error
    if hashlib.sha256(weights).hexdigest() != digest:
        raise ArtifactError(f"{folder / WEIGHTS} is not what {DESCRIPTION} describes")
    return str(digest)


def load_untrained(folder: Path) -> ImageModel:
    """Build the network that ``model.json`` of a folder describes, without its weights.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    from mea_ray.models.build import build_model

    try:
        spec = json.loads(patiently((folder / DESCRIPTION).read_bytes, folder / DESCRIPTION))["spec"]
        return build_model(spec["name"], tuple(spec["shape"]), spec["classes"], spec["params"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError, RuntimeError) as error:
        raise ArtifactError(f"{folder} describes no model: {type(error).__name__}: {error}") from error


def load_model(folder: Path, *, own_networks_only: bool = False) -> tuple[ImageModel, dict[str, Any]]:
    """Build the network of a folder again and fill in its weights.

    Args:
        folder: The folder.
        own_networks_only: Refuse a network from outside mea_ray, which the folder names and which would be imported:
            for folders that somebody else wrote.

    Returns:
        The model, on the CPU, in eval mode, and the ``info`` it was saved with.

    Raises:
        ArtifactError: A file is missing, damaged, of another schema, or does not fit the other.
    """
    from mea_ray.models.build import build_model

    folder = Path(folder)
    remedy = "train the model again, or restore the folder from a copy"
    try:
        weights = patiently((folder / WEIGHTS).read_bytes, folder / WEIGHTS)
        body = json.loads(patiently((folder / DESCRIPTION).read_bytes, folder / DESCRIPTION))
        version, digest, spec, info = (body[key] for key in ("schema_version", "sha256", "spec", "info"))
        if version != SCHEMA_VERSION:
            raise ArtifactError(f"{folder / DESCRIPTION} has schema version {version}, not {SCHEMA_VERSION}; {remedy}")
        if hashlib.sha256(weights).hexdigest() != digest:
            raise ArtifactError(
                f"{folder / WEIGHTS} is not what {DESCRIPTION} describes: its sha256 is not {digest}; {remedy}"
            )
        if own_networks_only and ":" in str(spec["name"]):
            raise ArtifactError(
                f"{folder / DESCRIPTION} names the network {spec['name']!r}, which would be imported; give the file of "
                "weights alone, and name a network that you trust"
            )
        model = build_model(spec["name"], tuple(spec["shape"]), spec["classes"], spec["params"])
        model.load_state_dict(load_tensors(weights))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigError, RuntimeError) as error:
        raise ArtifactError(f"{folder} holds no readable model: {type(error).__name__}: {error}; {remedy}") from error
    return model.eval(), info
