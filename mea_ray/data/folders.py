"""The layout of a folder of images: parts with classes, classes alone, or images without classes."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mea_ray.core.errors import DataError
from mea_ray.data.classes import in_order
from mea_ray.data.files import File, Walk
from mea_ray.data.parts import Part, is_neutral, mentioned_parts, only_one, parts_of
from mea_ray.data.skipped import Skipped, warn

Names = tuple[str, ...]
_LISTED = 5
_MASKS = frozenset(
    {"mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations", "groundtruth"}
)
"""Names of folders of segmentation masks."""


@dataclass(frozen=True)
class Group:
    """The images of one part, or of a folder that has no parts.

    Attributes:
        folder: The folder that holds them.
        classes: Class name to its files, in the order of the classes; empty if the images have no classes.
        files: Files without a class; empty if the images have classes.
        empty: Folders of classes that hold no images.
    """

    folder: Path
    classes: dict[str, list[File]]
    files: list[File]
    empty: list[Path]

    @property
    def labelled(self) -> bool:
        """The images are in one folder per class."""
        return bool(self.classes)


@dataclass(frozen=True)
class Layout:
    """The contents of a folder of images.

    Attributes:
        parts: The images of each part; empty if there are no parts.
        whole: All images, if there are no parts.
    """

    parts: dict[Part, Group]
    whole: Group | None


def read_layout(root: Path, walked: Walk, skipped: Skipped) -> Layout:
    """Find out which folders are parts and which are classes.

    Folders named after train and test are parts if train has subfolders or test lies beside it. There may be single
    folders above parts and classes. Below a part there may be one folder with a neutral name:
    ``animals/train/images/<class>``. An image belongs to the class whose folder it lies in, however deep.

    Args:
        root: Where the walk began.
        walked: Its images, at least one, and its folders.
        skipped: Counts images outside of all parts and classes.

    Raises:
        DataError: Two folders are the same part, or folders below the classes are named after train and test.
    """
    level = _level_of_parts([file.folders for file in walked.files])
    if level is None:
        above = _above_classes(walked.files)
        _check_no_parts_below(root, walked, len(above))
        return Layout({}, _group(root, above, walked.files, walked.folders, skipped))
    above = next(file.folders[:level] for file in walked.files if len(file.folders) > level)
    parts = parts_of({file.folders[level] for file in walked.files if len(file.folders) > level})
    files: dict[str, list[File]] = defaultdict(list)
    for file in walked.files:
        name = file.folders[level] if len(file.folders) > level else ""
        if name in parts:
            files[name].append(file)
        else:
            skipped.add("images outside of the folders of parts", str(file.path.parent))
    groups: dict[Part, Group] = {}
    for part in get_args(Part):
        listed = sorted(name for name in parts if parts[name] == part)
        if not listed:
            continue
        only_one(part, listed, root.joinpath(*above))
        folder = _down_to_classes((*above, listed[0]), files[listed[0]])
        groups[part] = _group(root, folder, files[listed[0]], walked.folders, skipped)
        _check_classes_are_no_parts(groups[part])
    return Layout(groups, None)


def _level_of_parts(folders: Sequence[Names]) -> int | None:
    """Return the depth at which folders are parts; None if there is none. Above it is a single folder at each depth."""
    level = 0
    while True:
        names = {path[level] for path in folders if len(path) > level}
        parts = parts_of(names)
        if "train" in parts.values():
            trains = {name for name, part in parts.items() if part == "train"}
            nested = any(path[level] in trains for path in folders if len(path) > level + 1)
            if nested or len(set(parts.values())) > 1:
                return level
        if parts and len(parts) == len(names):
            return level
        if len(names) != 1 or any(len(path) <= level for path in folders):
            return None
        level += 1


def _above_classes(files: Sequence[File]) -> Names:
    """Return the single folders above the folders of classes."""
    depth = 0
    while len({file.folders[: depth + 1] for file in files}) == 1 and len(files[0].folders) > depth + 1:
        depth += 1
    return files[0].folders[:depth]


def _check_no_parts_below(root: Path, walked: Walk, level: int) -> None:
    """Refuse folders of parts that lie in a class or would be classes themselves."""
    names = {file.folders[level] for file in walked.files if len(file.folders) > level}
    nested = {file.folders[level] for file in walked.files if len(file.folders) > level + 1}
    mentioned = mentioned_parts(names)
    if len(set(mentioned.values())) > 1 and (len(mentioned) == len(names) or nested.intersection(mentioned)):
        raise DataError(
            f"{root} has the folders {', '.join(sorted(mentioned))}, which are parts rather than classes by their "
            "names; call them train and test"
        )
    inside: dict[Names, set[str]] = defaultdict(set)
    for file in walked.files:
        for depth in range(1, len(file.folders)):
            inside[file.folders[:depth]].add(file.folders[depth])
    for name in sorted(nested):
        if part := parts_of([name]).get(name):
            raise DataError(
                f"{name} in {root} is a {part} part by its name, with folders of classes in it, and there is no train "
                "part beside it; call that one train, or set data.path to the folder of the classes"
            )
    for above, names in inside.items():
        parts = parts_of(names)
        if "train" in parts.values() and len(set(parts.values())) > 1:
            folder = root.joinpath(*above)
            raise DataError(
                f"{folder} has the folders {', '.join(sorted(parts))}, so that it would be a dataset rather than a "
                f"class; set data.path={folder}, or lay the images out as train/<class> and test/<class>"
            )
    _check_no_parts_in_different_classes(root, walked, level)
    _warn_of_equal_folders(root, walked, level)


def _check_no_parts_in_different_classes(root: Path, walked: Walk, level: int) -> None:
    """Refuse ``data/train/<class>`` beside ``data2/test/<class>``, where data and data2 would be the classes."""
    deep = {file.folders[level : level + 2] for file in walked.files if len(file.folders) > level + 2}
    parts = parts_of({names[1] for names in deep})
    if "train" in parts.values() and len(set(parts.values())) > 1:
        one, other = (next(n for n in sorted(deep) if parts.get(n[1]) == p) for p in sorted(set(parts.values()))[:2])
        raise DataError(
            f"{root.joinpath(*one)} and {root.joinpath(*other)} are parts by their names, but lie in different "
            "folders; put them beside each other, and set data.path to the folder of both"
        )


def _warn_of_equal_folders(root: Path, walked: Walk, level: int) -> None:
    """Warn if all classes contain folders of the same names: these may be the intended classes."""
    inside: dict[str, set[str]] = defaultdict(set)
    for file in walked.files:
        if len(file.folders) > level:
            inside[file.folders[level]].update(file.folders[level + 1 : level + 2])
    common = sorted(set.intersection(*inside.values())) if len(inside) > 1 else []
    if len(common) > 1:
        names = ", ".join(sorted(inside)[:_LISTED]) + (", ..." if len(inside) > _LISTED else "")
        more = ", ..." if len(common) > _LISTED else ""
        warn(
            f"{root}: the classes are {names}; each holds the folders {', '.join(common[:_LISTED])}{more}, which are "
            "ignored. If these are the classes, set data.path to the folder above them"
        )


def _check_classes_are_no_parts(group: Group) -> None:
    parts = parts_of(set(group.classes))
    if "train" in parts.values() and len(set(parts.values())) > 1:
        raise DataError(
            f"{group.folder} has the folders {', '.join(sorted(parts))}, which are parts rather than classes by their "
            f"names; set data.path={group.folder} to read them as parts"
        )


def _check_no_masks(folder: Path, classes: Iterable[str]) -> None:
    """Refuse ``images`` beside ``masks``: these are pictures and their segmentation, not two classes."""
    names = list(classes)
    masks = [name for name in names if _MASKS.issuperset(name.lower().replace("_", " ").split()) and name.strip("_ ")]
    images = [name for name in names if is_neutral(name) and name not in masks]
    if masks and images:
        raise DataError(
            f"{folder} has the folders {images[0]} and {masks[0]}, which are images and their masks rather than two "
            "classes by their names; put the images of each class into a folder named after the class, or set "
            f"data.path={folder / images[0]} to read them without classes"
        )


def _group(root: Path, prefix: Names, files: list[File], folders: Iterable[Names], skipped: Skipped) -> Group:
    """Sort the files below a folder by class."""
    depth = len(prefix)
    classes: dict[str, list[File]] = defaultdict(list)
    loose = []
    for file in files:
        if len(file.folders) > depth:
            classes[class_name(file.folders[depth])].append(file)
        else:
            loose.append(file)
    _check_no_masks(root.joinpath(*prefix), classes)
    if classes:
        for file in loose:
            skipped.add("images outside of the folders of classes", str(file.path))
        loose = []
    empty = [
        root.joinpath(*path)
        for path in folders
        if len(path) == depth + 1 and path[:depth] == prefix and class_name(path[-1]) not in classes
    ]
    return Group(root.joinpath(*prefix), {name: classes[name] for name in in_order(classes)}, loose, empty)


def _down_to_classes(prefix: Names, files: Sequence[File]) -> Names:
    """Descend into a single folder with a neutral name or the part's name, as in ``seg_train/seg_train/<class>``."""
    while True:
        depth = len(prefix)
        names = {file.folders[depth] if len(file.folders) > depth else "" for file in files}
        name = next(iter(names)) if len(names) == 1 else ""
        if not (is_neutral(name) or parts_of([name])):
            return prefix
        prefix = (*prefix, name)


def class_name(folder: str) -> str:
    """Return the name of a class: the decoded name of its folder, with accents composed.

    Desktops write accents differently, and old archives contain names in Latin-1.
    """
    try:
        folder.encode("utf-8")
    except UnicodeEncodeError:
        folder = os.fsencode(folder).decode("latin-1")
    return unicodedata.normalize("NFC", folder)
