"""Folders of image files, one folder per class, as in ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.assemble import assemble, cut, pool, unlabelled
from mea_ray.data.classes import warn_of_names
from mea_ray.data.decode import SUFFIXES, Encoded, decode
from mea_ray.data.decoded import decode_once
from mea_ray.data.files import File, existing_folder, walk, without_second_links
from mea_ray.data.folders import Group, Layout, read_layout
from mea_ray.data.options import Fraction, ImageSize
from mea_ray.data.skipped import Skipped, warn

NAME = "image_folder"


def load(
    *,
    path: str = "",
    image_size: ImageSize = 64,
    test_fraction: Fraction = 0.2,
    max_images_per_class: Annotated[int, Field(ge=1)] | None = None,
    class_names: tuple[str, ...] | None = None,
    in_memory: bool = True,
) -> Dataset:
    """Load image files of your own: in folders of classes, or alone as a thief's pool.

    Choose it for images of your own in one folder per class.

    ``train/<class>/*.jpg`` with ``test`` or ``val`` beside it, ``<class>/*.jpg`` alone, and ``*.jpg`` alone are read.
    Folders may be called ``Train``, ``testing``, ``val_set``, ``seg_train``, ``images/train`` and the like.
    ``test`` is preferred to ``val``, unless it has no classes and ``val`` has. Images without classes, or without a
    test part beside ``train``, load as a thief's pool (``splits.thief_pool``) and not as ``data``.

    Hidden files and folders are never read. What else was left out is counted in a warning. Pictures are turned as
    their EXIF orientation says, transparent pixels are put on white, and of an animation the first frame is read.
    ``mea_ray.data.decode`` lists the formats and limits.

    100 classes of ImageNet at 64 x 64 take 1.6 GB of memory, all of ImageNet at 224 x 224 takes 193 GB. With
    ``in_memory=false`` the images are on disk, in ``$XDG_CACHE_HOME/mea_ray``, and take no memory; results are the
    same. Two copies are stored there: all decoded images, and the same divided into parts. All processes of a machine
    share the files. In a sweep each node opens them itself, not through Ray's object store, so every node needs the
    folder.

    Args:
        path: Folder of the parts, of the classes, or of the images.
        image_size: Shorter sides are resized to it, in pixels, and the middle square is cut out.
        test_fraction: Fraction of the images that becomes test, stratified, where there are folders of classes only.
        max_images_per_class: Largest number of images of each class in each part: the first ones by name; null takes
            all.
        class_names: Names of all folders of classes, in the order of the classes; null sorts them. A network in
            `victim.weights` has the order that it was trained with; torchvision sorts numbers as text.
        in_memory: Decode into memory. With false, decode into a memory-mapped file, which is reused until an image
            changes.

    Returns:
        Images of shape (1, image_size, image_size) when all are grey, else (3, image_size, image_size). Classes are the
        sorted names of the folders; if all are whole numbers they are sorted as numbers, 2 before 10.

    Raises:
        ConfigError: ``path`` is missing.
        DataError: The folder is missing, holds no images, holds two folders for one part, or holds parts inside of
            classes; test has a class that train lacks; ``class_names`` are not those of the folders; an image is
            damaged.
    """
    if not path:
        raise ConfigError("data.path is empty; give a folder of images, e.g. data.path=/data/imagenet")
    root = existing_folder(path)
    skipped = Skipped()
    walked = walk(root, SUFFIXES, skipped)
    if not walked.files:
        left_out = f" (not read: {skipped})" if str(skipped) else ""
        raise DataError(
            f"{root} holds no images with the suffixes {', '.join(sorted(SUFFIXES))}{left_out}; check data.path"
        )
    layout = read_layout(root, walked, skipped)
    reader = _Reader(root, image_size, max_images_per_class, skipped, class_names, in_memory)
    dataset = reader.read(layout, test_fraction)
    skipped.warn(f"{NAME}: {root}")
    if class_names is None:
        warn_of_names(dataset.train.class_names, f"{NAME}: {root}")
    return dataset


class _Reader:
    def __init__(
        self,
        root: Path,
        image_size: int,
        most: int | None,
        skipped: Skipped,
        names: tuple[str, ...] | None,
        in_memory: bool,
    ) -> None:
        self.root, self.image_size, self.most, self.skipped, self.names = root, image_size, most, skipped, names
        self.in_memory = in_memory

    def read(self, layout: Layout, test_fraction: float) -> Dataset:
        train = layout.whole or layout.parts.get("train")
        if train is None:
            raise DataError(
                f"{self.root} has a folder for {' and '.join(sorted(layout.parts))} and none for train; add it, or set "
                "data.path to the folder of the images"
            )
        missing = _missing_labels(train)
        if layout.whole is not None:
            (images,) = self._decode([train])
            return pool(NAME, images, missing) if missing else cut(NAME, images, test_fraction, str(self.root))
        test = self._test(layout)
        missing = missing or _missing_test(self.root, train, test)
        if missing or test is None:
            (images,) = self._decode([train])
            return pool(NAME, images, missing)
        if unknown := sorted(test.classes.keys() - train.classes.keys()):
            raise DataError(
                f"{test.folder} has the class {unknown[0]!r}, which {train.folder} has not; their folders must agree"
            )
        train_images, test_images = self._decode([train, test])
        return assemble(NAME, train_images, test_images, str(self.root))

    def _test(self, layout: Layout) -> Group | None:
        """Return the part that is tested on: test, but validation where test has no labels and validation has."""
        test, validation = layout.parts.get("test"), layout.parts.get("validation")
        if test is None or validation is None:
            return test or validation
        if validation.labelled and not test.labelled:
            warn(f"{NAME}: {test.folder} has no classes; {validation.folder} is the test part instead")
            return validation
        unused = [*validation.files, *(file for files in validation.classes.values() for file in files)]
        self.skipped.add("images of a second test part", str(validation.folder), len(unused))
        return test

    def _decode(self, groups: list[Group]) -> list[ImageSet]:
        """Decode groups; those after the first have the classes of the first, and no other files."""
        names = self._order(groups[0])
        listed = [
            (place, label, file)
            for place, group in enumerate(groups)
            for label, files in (
                enumerate(group.classes.get(name, [])[: self.most] for name in names)
                if names
                else [(-1, group.files[: self.most])]
            )
            for file in files
        ]
        wanted = set(map(id, without_second_links((file for _, _, file in listed), self.skipped)))
        parts: list[ImageSet] = []
        for place in range(len(groups)):
            chosen = [(label, file) for where, label, file in listed if where == place and id(file) in wanted]
            if not chosen:
                raise DataError(f"{groups[place].folder} holds only links to images of {groups[0].folder}; add others")
            if self.in_memory:
                images = decode((_encoded(file) for _, file in chosen), len(chosen), self.image_size)
            else:
                images = decode_once([file.path for _, file in chosen], self.image_size)
            labels = np.array([label for label, _ in chosen], np.int64)
            parts.append(ImageSet(images, labels, names) if names else unlabelled(images))
        return parts

    def _order(self, group: Group) -> tuple[str, ...]:
        if self.names is None:
            return tuple(group.classes)
        if sorted(self.names) != sorted(group.classes):
            differ = sorted(set(self.names).symmetric_difference(group.classes)) or [
                name for name in self.names if self.names.count(name) > 1
            ]
            raise DataError(
                f"data.class_names={list(self.names)} must list each folder of a class in {group.folder} once; "
                f"{differ[0]!r} is missing in one of them, or listed twice"
            )
        return self.names


def _encoded(file: File) -> Encoded:
    return Encoded(str(file.path), file.path)


def _missing_labels(train: Group) -> str:
    """Return why images without classes cannot be ``data``; empty if they have classes."""
    if not train.labelled:
        return (
            f"{train.folder} has images and no folders of classes, so that they can only be a thief's pool "
            "(splits.thief_pool); put the images of each class into a folder named after the class"
        )
    if train.empty:
        return (
            f"{train.empty[0]} holds no images ({', '.join(sorted(SUFFIXES))}); add some or remove the folder of the "
            "class"
        )
    return ""


def _missing_test(root: Path, train: Group, test: Group | None) -> str:
    """Return why images without a test part cannot be ``data``; empty if they have one."""
    if test is None:
        return (
            f"{root} has images for train but none for test (in a folder test, val or validation); add some, or set "
            f"data.path={train.folder} to cut test off train by data.test_fraction"
        )
    if not test.labelled:
        return (
            f"{test.folder} has images and no folders of classes, and there is no other test part; sort it into "
            f"folders of classes, or set data.path={train.folder} to cut test off train by data.test_fraction"
        )
    if absent := [name for name in train.classes if name not in test.classes]:
        return f"{test.folder / absent[0]} holds no images; add some, or remove the class from {train.folder}, too"
    return ""
