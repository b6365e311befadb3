"""Watermark samples as pictures: shown to the judge, never seen by the thief.

They are mixed again from the victim's key and held-out images, so they need the victim's artifact and its dataset.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mea_ray.core.errors import ArtifactError, DataError, MeaRayError
from mea_ray.core.types import Images
from mea_ray.results.portable import without_paths
from mea_ray.results.records import TrialResult

if TYPE_CHECKING:
    from mea_ray.config import ExperimentConfig
    from mea_ray.watermarks.base import WatermarkSamples

PER_STRIP = 8
PIXELS = 64
GAP = 4


@dataclass(frozen=True)
class PictureStrip:
    """A row of pictures.

    Attributes:
        caption: What they are.
        alt: Alternative text.
        uri: One PNG as a ``data:`` URI.
        width: Width of the PNG in pixels.
    """

    caption: str
    alt: str
    uri: str
    width: int


def strip_png(images: Images) -> tuple[bytes, int]:
    """Place images side by side in one PNG, enlarged without smoothing to about ``PIXELS`` pixels each.

    Args:
        images: uint8, (N, C, H, W); one channel is shown in grey, of more than three the first three are shown.

    Returns:
        The PNG file's bytes and its width in pixels. The gaps are transparent.
    """
    from PIL import Image

    count, channels, height, width = images.shape
    colour = images[:, :3] if channels >= 3 else np.repeat(images[:, :1], 3, axis=1)
    scale = max(1, round(PIXELS / max(height, width)))
    pictures = colour.transpose(0, 2, 3, 1).repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    sheet = np.zeros((height, count * (width + GAP) - GAP, 4), np.uint8)
    for position, picture in enumerate(pictures):
        left = position * (width + GAP)
        sheet[:, left : left + width, :3] = picture
        sheet[:, left : left + width, 3] = 255
    drawn = Image.fromarray(sheet)
    if max(height, width) > 2 * PIXELS:  # large photographs would take megabytes in a report
        factor = PIXELS / max(height, width)
        drawn = drawn.resize((max(1, round(drawn.width * factor)), max(1, round(drawn.height * factor))))
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue(), drawn.width


def strip(images: Images, caption: str, count: int = PER_STRIP) -> PictureStrip:
    """Return the first ``count`` images as a strip."""
    data, width = strip_png(images[:count])
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return PictureStrip(caption, f"{len(images[:count])} pictures: {caption}", uri, width)


def strips(samples: WatermarkSamples, class_names: Sequence[str], count: int = PER_STRIP) -> list[PictureStrip]:
    """Return strips of clean sources per class, of watermark samples, and of every other geometry.

    Args:
        samples: From ``Watermark.samples`` on held-out images.
        class_names: Names of all classes.
        count: Maximum number of pictures per strip.
    """
    sources = list(dict.fromkeys(int(label) for label in samples.source_labels))
    made = [
        strip(
            samples.sources[samples.source_labels == label], f"clean source samples, class {class_names[label]}", count
        )
        for label in sources
    ]
    named = " and ".join(class_names[label] for label in sources)
    of = f" of {named}" if named else ""
    # A scheme without a target class (-1) has its own test for a success.
    target = f", target {class_names[samples.target]}" if samples.target >= 0 else ""
    made.append(strip(samples.images, f"watermark samples{of}{target}", count))
    wrong = f"must not be answered {class_names[samples.target]}" if target else "must not be recognised"
    made += [
        strip(images, f"not the watermark ({name}): {wrong}", count)
        for name, images in samples.adverse.items()
        if len(images)
    ]
    return [each for each in made if each.width > 0]


@dataclass(frozen=True)
class Gallery:
    """The pictures of one victim, or why there are none."""

    victim: str
    strips: list[PictureStrip]
    missing: str = ""


def gallery(result: TrialResult, storage: str | Path | None = None, folder: Path | None = None) -> Gallery:
    """Make the watermark samples of a trial's victim again.

    Args:
        result: Any trial with the victim.
        storage: Storage of the artifacts; None takes the one that the sweep was started with.
        folder: The sweep's folder, which records where data and artifacts are.

    Returns:
        The pictures, or the reason why there are none if the artifact or the dataset is missing. A report must not fail
        because it is rendered on another machine.
    """
    if result.victim_report.wsr is None:
        return Gallery(result.victim, [], "the victim carries no watermark")
    try:
        return Gallery(result.victim, _from_artifact(result, storage, folder))
    except (MeaRayError, OSError, ImportError) as error:
        return Gallery(result.victim, [], without_paths(f"{type(error).__name__}: {error}"))


def _own_config(result: TrialResult, folder: Path | None) -> Path | None:
    """Return the config with the paths that a trial was started with; None if its folder is missing."""
    own = folder / "trials" / result.trial / "config.yaml" if folder is not None else None
    return own if own is not None and own.is_file() else None


def _storage_of(result: TrialResult, folder: Path | None) -> str:
    from mea_ray.config import ExperimentConfig, load_tree

    own = _own_config(result, folder)
    tree = result.config if own is None else load_tree(own)
    return str(tree.get("storage") or ExperimentConfig.model_fields["storage"].default)


def _as_it_was_run(result: TrialResult, folder: Path | None) -> ExperimentConfig:
    from mea_ray.config import ExperimentConfig, build, load_stored

    own = _own_config(result, folder)
    return build(ExperimentConfig, result.config) if own is None else load_stored(own)


def _from_artifact(result: TrialResult, storage: str | Path | None, folder: Path | None) -> list[PictureStrip]:
    from mea_ray.experiment.artifacts import Store

    # Checked first: reading data and key, and building a config, needs torch.
    artifact = Store(str(storage or _storage_of(result, folder))).find("victims", result.victim)
    if artifact is None:
        raise ArtifactError("the victim's artifact is not in the storage; give its storage with --storage")
    from mea_ray.experiment.data import Fingerprints, load_owners_part
    from mea_ray.experiment.names import victim_name
    from mea_ray.watermarks.base import Key

    config = _as_it_was_run(result, folder)
    key = Key.load(artifact)
    data = load_owners_part(config)
    if victim_name(config, Fingerprints.of(data, config)) != result.victim:
        raise DataError("the data have changed since the victim was trained")
    held_out = data.verification
    samples = config.victim.watermark.build().samples(key, held_out, PER_STRIP, config.seed)
    return strips(samples, held_out.class_names)
