"""The base of schemes that mix two source classes: the key, and the samples that verify it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from mea_ray.core.class_keys import AdmissibleKeys
from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.watermarks.base import Key, Watermark, WatermarkSamples
from mea_ray.watermarks.combiners.base import Combiner, to_uint8
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mixing import Mixing, build_combiner


def mean_colour(images: Images) -> tuple[float, ...]:
    """Mean of each channel in [0, 1] over uint8 images (N, C, H, W)."""
    return tuple(float(images[:, channel].mean(dtype=np.float64) / 255) for channel in range(images.shape[1]))


def as_float(images: Images | torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 in [0, 1]."""
    return torch.as_tensor(images).float() / 255


def evenly(items: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Take ``count`` items (all of them if there are fewer), evenly spaced over their order."""
    return items[np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(np.int64)]


def admissible_keys(train: ImageSet, geometries: Collection[str] = ()) -> AdmissibleKeys:
    """Return all keys that can be drawn for a training set: every ordered pair of classes with every third one.

    Args:
        train: The victim's training images.
        geometries: Names of the geometries that the key's is drawn from; empty if it is not drawn.

    Raises:
        ConfigError: There are fewer than three classes, or one of them has no training image.
    """
    present = len(np.unique(train.labels))
    if present < train.classes or present < 3:
        raise ConfigError(
            f"victim.watermark.key.classes: a drawn key needs at least three classes, all with training images, but "
            f"{present} of {train.classes} classes have any; set victim.watermark.key.classes=chosen"
        )
    return AdmissibleKeys(train.classes, ordered=True, geometries=tuple(sorted(geometries)))


def _check_classes(classes: tuple[int, int, int], train: ImageSet) -> None:
    for setting, label in zip(("source_classes", "source_classes", "target_class"), classes, strict=True):
        if label >= train.classes:
            last = train.classes - 1
            raise ConfigError(f"{setting}: class {label} does not exist; choose labels from 0 to {last}")
        if not (train.labels == label).any():
            raise ConfigError(
                f"{setting}: class {label} has no training image; choose one of {np.unique(train.labels)}"
            )


class MixedClasses(Watermark):
    """A watermark whose samples are mixes of two source classes.

    Args:
        source_classes: Labels of the two classes that are mixed.
        target_class: Label that the victim gives to a mix.
        mixing: How they are mixed.
        key: Whether the classes are those given, or drawn.

    Raises:
        ConfigError: Classes coincide or are negative, or a geometry makes the combiner's own mixes.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "combiner_options": "mixing.combiner",
        "combiner": "mixing.combiner.name",
        "orientation": "mixing.combiner.orientation",
        "jitter": "mixing.combiner.jitter",
        "alpha": "mixing.combiner.alpha",
        "adverse_geometries": "mixing.adverse",
        "mix_space": "mixing.space",
    }

    def __init__(
        self, source_classes: tuple[int, int], target_class: int, mixing: Mixing, key: KeyDraw = KeyDraw()
    ) -> None:
        self.source_classes = (int(source_classes[0]), int(source_classes[1]))
        self.target_class = target_class
        if len(set(self.classes)) != 3 or min(self.classes) < 0:
            raise ConfigError(
                f"source_classes={list(self.source_classes)} and target_class={target_class} must be three different "
                "labels, none negative"
            )
        self.mixing, self.key_draw = mixing, key
        self.geometries = dict(mixing.geometries())
        if not self.geometries:
            raise ConfigError("mixing.adverse: the combiner makes all of the authors' geometries; name another one")
        own = mixing.combiner.name
        if key.geometry == "drawn" and (own == "autoencoder" or own in self.geometries):
            raise ConfigError(
                f"key.geometry=drawn: mixing.combiner={own} is trained for the key, or has the name of a geometry of "
                "mixing.adverse; choose another combiner, or key.geometry=chosen"
            )

    @property
    def classes(self) -> tuple[int, int, int]:
        """Both source classes and the target."""
        return (*self.source_classes, self.target_class)

    @property
    def drawable(self) -> dict[str, dict[str, Any]]:
        """The geometries that the key's is drawn from, with their options; empty if it is not drawn."""
        if self.key_draw.geometry == "chosen":
            return {}
        return {self.mixing.combiner.name: self.mixing.combiner.params, **self.geometries}

    def check(self, train: ImageSet, seed: int, *, encodes: bool) -> None:
        """Refuse what could not be embedded; the combiner is built, but not trained.

        Raises:
            ConfigError: As ``make_key``, or the scheme marks the other kind of model.
        """
        self.check_kind(encodes=encodes)
        if self.key_draw.classes == "chosen":
            _check_classes(self.classes, train)
        else:
            admissible_keys(train)
        fill = (0.0,) * train.shape[0]
        build_combiner(self.mixing.combiner.name, self.mixing.combiner.params, train.shape, fill, seed)
        for name, options in self.geometries.items():
            build_combiner(name, options, train.shape, fill, seed)

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the key and let the combiner learn what it needs from the source classes.

        Args:
            train: The victim's training images.
            seed: Seed of the key.

        Raises:
            ConfigError: A class does not exist in ``train``, or has no image there; or a key is to be drawn from fewer
                than three classes.
        """
        key_seed = derive(seed, "key")
        classes, admissible, name = self.classes, None, self.mixing.combiner.name
        if self.key_draw.classes != "chosen":
            admissible = admissible_keys(train, self.drawable)
            drawn = self.key_draw.draw(admissible, key_seed)
            classes = (*drawn.sources, drawn.target)
            name = drawn.geometry or name
        _check_classes(classes, train)
        fill = (0.0,) * train.shape[0] if self.mixing.space == "pixel" else mean_colour(train.images)
        others = {self.mixing.combiner.name: self.mixing.combiner.params, **self.geometries}
        options = others.pop(name)
        if name == self.mixing.combiner.name:
            others = self.geometries  # one of which may have its name
        combiner = build_combiner(name, options, train.shape, fill, key_seed)
        first, second = (train.of_class(label) for label in classes[:2])
        settings = {
            "combiner": name,
            "combiner_options": options,
            "geometries": others,
            "fill": list(fill),
            "shape": list(train.shape),
        }
        tensors = combiner.fit(first, second)
        draw = self.key_draw.record(admissible)
        return Key(self.name, classes[:2], classes[2], key_seed, settings, tensors, draw)

    @staticmethod
    def combiners(key: Key, changed: Mapping[str, Any] | None = None) -> tuple[Combiner, dict[str, Combiner]]:
        """Build the watermark's combiner and the other geometries from the key alone.

        Args:
            key: The owner's key.
            changed: Options of the watermark's combiner that replace the key's, by name.

        Raises:
            ArtifactError: The key was not made by this scheme.
            ConfigError: ``changed`` names an option that the combiner does not have.
        """
        try:
            fill, shape = tuple(key.settings["fill"]), tuple(key.settings["shape"])
            name, options = key.settings["combiner"], key.settings["combiner_options"]
            geometries = key.settings["geometries"]
        except KeyError as error:
            raise ArtifactError(
                f"the key of scheme {key.scheme!r} lacks {error}; it is not a key of mixed classes"
            ) from None
        combiner = build_combiner(name, {**options, **(changed or {})}, shape, fill, key.seed)
        combiner.load(key.tensors)
        # Sorted, as a key's file is: a key that was read back trains and verifies as the one that was written.
        others = {n: build_combiner(n, geometries[n], shape, fill, key.seed) for n in sorted(geometries)}
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
