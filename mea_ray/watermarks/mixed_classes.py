"""What both modes of MEA-Defender share: two source classes, a combiner, other geometries, and a key of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.watermarks.base import Key, Watermark, WatermarkSamples
from mea_ray.watermarks.combiners import COMBINERS
from mea_ray.watermarks.combiners.base import Combiner, to_uint8

AUTHORS_GEOMETRIES = ("top_bottom", "left_right", "diagonal", "donut", "hotdog")
"""The authors' code: both halves (the other one than the watermark's), diagonal, donut, hot dog."""
NOMINAL_SHAPE = (3, 32, 32)


def mean_colour(images: Images) -> tuple[float, ...]:
    """Mean of each channel in [0, 1] over uint8 images (N, C, H, W)."""
    return tuple(float(images[:, channel].mean(dtype=np.float64) / 255) for channel in range(images.shape[1]))


def as_float(images: Images | torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 in [0, 1]."""
    return torch.as_tensor(images).float() / 255


def evenly(items: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Take ``count`` items (all of them if there are fewer), evenly spaced over their order."""
    return items[np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(np.int64)]


class MixedClasses(Watermark):
    """A watermark whose samples are mixes of two source classes. See ``MeaDefender`` for the parameters.

    Raises:
        ConfigError: Classes coincide or are negative, a geometry is unknown or is the combiner's own, a combiner's
            option is unknown.
    """

    def __init__(
        self,
        source_classes: tuple[int, int],
        target_class: int,
        combiner: str,
        combiner_options: Mapping[str, Any],
        adverse_geometries: Sequence[str] | None,
        mix_space: str,
        jitter: int,
    ) -> None:
        self.source_classes = (int(source_classes[0]), int(source_classes[1]))
        self.target_class = target_class
        classes = (*self.source_classes, target_class)
        if len(set(classes)) != 3 or min(classes) < 0:
            raise ConfigError(
                f"source_classes={list(self.source_classes)} and target_class={target_class} must be three different "
                "labels, none negative"
            )
        self.combiner = combiner
        self.combiner_options = COMBINERS.check(combiner, combiner_options)
        self.mix_space = mix_space
        self.jitter = jitter
        own = self._build(combiner, self.combiner_options, NOMINAL_SHAPE, (0.0,) * 3, 0).kinds
        names = AUTHORS_GEOMETRIES if adverse_geometries is None else tuple(adverse_geometries)
        kinds = {name: self._build(name, self._geometry(name), NOMINAL_SHAPE, (0.0,) * 3, 0).kinds for name in names}
        if adverse_geometries is None:
            names = tuple(name for name in names if not kinds[name] & own)
        for name in names:
            if kinds[name] & own:
                raise ConfigError(
                    f"adverse_geometries: {name!r} gives the same mixes as the combiner {combiner!r} "
                    f"{self.combiner_options}; leave it out, or change the combiner"
                )
            if name == "autoencoder":
                raise ConfigError("adverse_geometries: 'autoencoder' is a combiner only; it learns for the key")
        if len(set(names)) != len(names) or not names:
            raise ConfigError(f"adverse_geometries={list(names)} must name at least one geometry, each once")
        self.adverse_geometries = names

    @staticmethod
    def _build(
        name: str, options: Mapping[str, Any], shape: tuple[int, int, int], fill: tuple[float, ...], seed: int
    ) -> Combiner:
        combiner: Combiner = COMBINERS.build(name, shape, fill, seed, **options)
        return combiner

    def _geometry(self, name: str) -> dict[str, Any]:
        """Options of a geometry of the other mixes: its defaults, and the watermark's jitter where it has one."""
        known = {parameter.name for parameter in COMBINERS.parameters(name)}
        return COMBINERS.check(name, {"jitter": self.jitter} if "jitter" in known else {})

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the key and let the combiner learn what it needs from the source classes.

        Args:
            train: The victim's training images.
            seed: Seed of the key.

        Raises:
            ConfigError: A class does not exist in ``train``, or has no image there.
        """
        for name, label in zip(("source_classes", "source_classes", "target_class"), self.classes, strict=True):
            if label >= train.classes:
                raise ConfigError(f"{name}: class {label} does not exist; choose labels from 0 to {train.classes - 1}")
            if not (train.labels == label).any():
                raise ConfigError(
                    f"{name}: class {label} has no training image; choose one of {np.unique(train.labels)}"
                )
        black = self.mix_space == "pixel"
        fill = (0.0,) * train.shape[0] if black else mean_colour(train.images)
        key_seed = derive(seed, "key")
        combiner = self._build(self.combiner, self.combiner_options, train.shape, fill, key_seed)
        first, second = (train.of_class(label) for label in self.source_classes)
        settings = {
            "combiner": self.combiner,
            "combiner_options": self.combiner_options,
            "geometries": {name: self._geometry(name) for name in self.adverse_geometries},
            "fill": list(fill),
            "shape": list(train.shape),
        }
        tensors = combiner.fit(first, second)
        return Key(self.name, self.source_classes, self.target_class, key_seed, settings, tensors)

    @property
    def classes(self) -> tuple[int, int, int]:
        """Both source classes and the target."""
        return (*self.source_classes, self.target_class)

    @staticmethod
    def combiners(key: Key, changed: Mapping[str, Any] | None = None) -> tuple[Combiner, dict[str, Combiner]]:
        """Build the watermark's combiner and the other geometries from the key alone.

        Args:
            key: The owner's key.
            changed: Options that the watermark's combiner is to have in place of the key's, by name.

        Raises:
            ArtifactError: The key was not made by this scheme.
            ConfigError: The combiner has no such option as ``changed`` names.
        """
        try:
            fill, shape = tuple(key.settings["fill"]), tuple(key.settings["shape"])
            name, options = key.settings["combiner"], key.settings["combiner_options"]
            geometries = key.settings["geometries"]
        except KeyError as error:
            raise ArtifactError(f"the key of scheme {key.scheme!r} lacks {error}; it is no MEA-Defender key") from None
        combiner = MixedClasses._build(name, {**options, **(changed or {})}, shape, fill, key.seed)
        combiner.load(key.tensors)
        # Sorted, as a key's file is: a key that was read back trains and verifies as the one that was written.
        others = {n: MixedClasses._build(n, geometries[n], shape, fill, key.seed) for n in sorted(geometries)}
        return combiner, others

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Mix held-out images, every pair at most once, equal mixes dropped.

        Args:
            key: The owner's key; all settings come from it, none from this object.
            held_out: The only images that are mixed.
            count: Samples wanted, for the watermark and for each other geometry; fewer if there are fewer pairs.
            seed: Seed of the pairs and of the mixes.

        Raises:
            DataError: A source class has no held-out image, or the images' shape is not the key's.
        """
        if list(held_out.shape) != list(key.settings.get("shape", held_out.shape)):
            raise DataError(
                f"held-out images are {held_out.shape}, the key was made for {tuple(key.settings['shape'])}; "
                "verify with the data that the victim was trained on"
            )
        first, second = (held_out.of_class(label) for label in key.source_classes)
        if not len(first) or not len(second):
            raise DataError(
                f"held-out images hold {len(first)} of class {key.source_classes[0]} and {len(second)} of class "
                f"{key.source_classes[1]}; at least one of each is needed: raise splits.verification_fraction"
            )
        combiner, others = self.combiners(key)
        return WatermarkSamples(
            images=self._mixes(combiner, first, second, count, derive(seed, "watermark")),
            target=key.target_class,
            adverse={n: self._mixes(c, first, second, count, derive(seed, n)) for n, c in others.items()},
            sources=np.concatenate([first, second]),
            source_labels=np.repeat(np.array(key.source_classes, dtype=np.int64), [len(first), len(second)]),
            other_classes=self._of_other_classes(key, combiner, held_out, count, derive(seed, "other_classes")),
        )

    @staticmethod
    def _of_other_classes(key: Key, combiner: Combiner, held_out: ImageSet, count: int, seed: int) -> Images | None:
        """Mix pairs of images of two different classes that the key does not name; None where there are none."""
        rest = held_out.take(np.flatnonzero(~np.isin(held_out.labels, [*key.source_classes, key.target_class])))
        if len(np.unique(rest.labels)) < 2:
            return None
        rng = numpy_generator(seed, "pairs")
        drawn = rng.choice(len(rest) ** 2, size=min(4 * count, len(rest) ** 2), replace=False)
        a, b = drawn // len(rest), drawn % len(rest)
        pairs = np.flatnonzero(rest.labels[a] != rest.labels[b])[:count]
        return MixedClasses._mixed(combiner, rest.images[a[pairs]], rest.images[b[pairs]], seed)

    @staticmethod
    def _mixes(combiner: Combiner, first: Images, second: Images, count: int, seed: int) -> Images:
        pairs = len(first) * len(second)
        rng = numpy_generator(seed, "pairs")
        chosen = rng.choice(pairs, size=min(count, pairs), replace=False)
        return MixedClasses._mixed(combiner, first[chosen // len(second)], second[chosen % len(second)], seed)

    @staticmethod
    def _mixed(combiner: Combiner, first: Images, second: Images, seed: int) -> Images:
        """Mix first[k] with second[k], equal mixes dropped."""
        generator = torch.Generator().manual_seed(derive(seed, "mixes"))
        mixes: Images = to_uint8(combiner(as_float(first), as_float(second), generator)).numpy()
        flat = mixes.reshape(len(mixes), -1)
        _, distinct = np.unique(flat, axis=0, return_index=True)
        return mixes[np.sort(distinct)]
