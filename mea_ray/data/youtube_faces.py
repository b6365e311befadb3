"""YouTube Faces: frames of videos of people, aligned on the face, with a table of boxes per person."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.assemble import assemble
from mea_ray.data.classes import in_order, warn_of_names
from mea_ray.data.decode import SUFFIXES, Encoded, decode
from mea_ray.data.files import File, existing_folder, left_out, visible, walk, without_second_links
from mea_ray.data.folders import class_name
from mea_ray.data.options import Fraction, ImageSize
from mea_ray.data.skipped import Skipped
from mea_ray.data.text import read_text

_FOLDER = "aligned_images_DB"
_COLUMNS = ("Filename", "X1", "Y1", "X2", "Y2")
_SPLIT_SEED = 0
_TABLE_SUFFIX = ".csv"
NAME = "youtube_faces"


@dataclass(frozen=True)
class _Frame:
    file: File
    video: str
    box: tuple[int, int, int, int] | None


def load(
    *,
    path: str = "",
    image_size: ImageSize = 64,
    crop: Literal["box", "full"] = "box",
    min_images: Annotated[int, Field(ge=2)] = 100,
    max_images_per_class: Annotated[int, Field(ge=2)] | None = None,
    test_fraction: Fraction = 0.2,
) -> Dataset:
    """Load YouTube Faces: frames of videos of persons with a table of boxes. Each person is a class.

    Choose it for faces, as in the paper; you bring the files.

    Frames are in ``<person>/<video>/*.jpg``, the table in ``<person>/<person>.csv``. The table is separated by
    semicolons and has the columns ``Filename`` (``<video>/<frame>.jpg``), ``X1``, ``Y1``, ``X2``, ``Y2``: corners of
    the face in pixels of the frame as viewers show it, turned as its EXIF orientation says. Other columns are ignored.
    It may be in UTF-8, UTF-16 or Windows-1252. The authors of MEA-Defender read the same layout.

    Frames of one video are nearly the same picture. Test therefore gets whole videos of a person with two or more,
    chosen to match ``test_fraction`` closely, and the last frames of a person with one video.

    Hidden files and folders are never read. What else was left out is counted in a warning.

    Args:
        path: Folder of the persons, or the folder above it (with ``aligned_images_DB``).
        image_size: Shorter sides are resized to it, in pixels, and the middle square is cut out.
        crop: ``box`` cuts out the face first; ``full`` takes the whole frame and needs no tables.
        min_images: Persons with fewer frames are dropped.
        max_images_per_class: Largest number of frames of a person, evenly spaced over all of them; null takes all.
        test_fraction: Fraction of each person's frames that becomes test.

    Returns:
        Images of shape (3, image_size, image_size), or (1, image_size, image_size) when all are grey. Classes are the
        sorted names of the persons; if all are whole numbers they are sorted as numbers.

    Raises:
        ConfigError: ``path`` is missing.
        DataError: Folders, tables or files are missing, a table is malformed, an image is damaged, or fewer than two
            persons have ``min_images`` frames.
    """
    if not path:
        raise ConfigError("data.path is empty; give the folder of YouTube Faces, e.g. data.path=/data/youtube_faces")
    root = existing_folder(path)
    root = root / _FOLDER if (root / _FOLDER).is_dir() else root
    skipped = Skipped()
    by_class = _whole_frames(root, skipped) if crop == "full" else _boxed_frames(root, skipped)
    wanted = set(
        map(id, without_second_links((frame.file for frames in by_class.values() for frame in frames), skipped))
    )
    unique = {name: [frame for frame in by_class[name] if id(frame.file) in wanted] for name in in_order(by_class)}
    persons = {name: frames for name, frames in unique.items() if len(frames) >= min_images}
    for name in sorted(unique.keys() - persons.keys()):
        skipped.add(f"persons with fewer than {min_images} frames", name)
    few = (
        f"{len(persons)} persons in {root} have {min_images} frames or more, a classifier needs 2; lower "
        "data.min_images or check data.path"
    )
    if not persons:
        raise DataError(f"{few} (not read: {str(skipped) or 'nothing'})")
    train: list[tuple[_Frame, int]] = []
    test: list[tuple[_Frame, int]] = []
    for label, (name, frames) in enumerate(persons.items()):
        trained, tested = _split(_thin(frames, max_images_per_class), test_fraction, name)
        train += [(frame, label) for frame in trained]
        test += [(frame, label) for frame in tested]
    skipped.warn(f"{NAME}: {root}")
    names = tuple(persons)
    warn_of_names(names, f"{NAME}: {root}")
    dataset = assemble(NAME, _decode(train, image_size, names), _decode(test, image_size, names), str(root))
    return dataset if len(persons) > 1 else replace(dataset, pool_only=few)


def _whole_frames(root: Path, skipped: Skipped) -> dict[str, list[_Frame]]:
    """List the images of every person, by video and name."""
    by_class: dict[str, list[_Frame]] = {}
    for file in walk(root, SUFFIXES | {_TABLE_SUFFIX}, skipped).files:
        if file.path.suffix.lower() == _TABLE_SUFFIX:
            continue  # expected, and not needed
        if len(file.folders) == 2:
            by_class.setdefault(class_name(file.folders[0]), []).append(_Frame(file, file.folders[1], None))
        else:
            skipped.add("images that are not in a folder <person>/<video>", str(file.path))
    return by_class


def _boxed_frames(root: Path, skipped: Skipped) -> dict[str, list[_Frame]]:
    """List the frames in every person's table, by video and name."""
    by_class: dict[str, list[_Frame]] = {}
    for entry in visible(root, skipped):
        if entry.is_dir():
            by_class.setdefault(class_name(entry.name), []).extend(_table_of(Path(entry.path), skipped))
        else:
            skipped.add("files beside the folders of persons", entry.name)
    return {name: sorted(frames, key=lambda frame: frame.file.path) for name, frames in by_class.items()}


def _table_of(person: Path, skipped: Skipped) -> list[_Frame]:
    """Read a person's table."""
    wanted = f"{person.name}{_TABLE_SUFFIX}"
    tables = [Path(entry.path) for entry in visible(person, skipped) if entry.name.lower() == wanted.lower()]
    if not tables or not tables[0].is_file():
        raise DataError(
            f"there is no table of boxes {str(person / wanted)!r} (Filename;Width;Height;X1;Y1;X2;Y2); add it, or set "
            "data.crop=full to use whole frames"
        )
    table = tables[0]
    reader = csv.DictReader(io.StringIO(read_text(table), newline=""), delimiter=";")
    frames: dict[Path, _Frame] = {}
    try:
        if missing := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
            raise DataError(
                f"{table} lacks the columns {', '.join(missing)}; its first line must read "
                "Filename;Width;Height;X1;Y1;X2;Y2"
            )
        for row in reader:
            frame = _row(person, f"{table}, line {reader.line_num}", row, skipped)
            if frame is not None and frames.setdefault(frame.file.path, frame) is not frame:
                skipped.add("lines that repeat a frame", f"{table.name}:{reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: {error}; correct the line") from None
    _count_unlisted(person, frames, skipped)
    return list(frames.values())


def _count_unlisted(person: Path, frames: dict[Path, _Frame], skipped: Skipped) -> None:
    """Count the frames of a person that the table does not list."""
    listed = {os.path.realpath(path) for path in frames}
    for file in walk(person, SUFFIXES | {_TABLE_SUFFIX}, Skipped()).files:
        if file.path.suffix.lower() != _TABLE_SUFFIX and file.real not in listed:
            skipped.add("frames that no table lists", str(file.path))


def _row(person: Path, where: str, row: dict[str, str | None], skipped: Skipped) -> _Frame | None:
    """Check a line of a table; None if its frame is hidden."""
    try:
        left, top, right, bottom = (int(row[column] or "") for column in _COLUMNS[1:])
    except ValueError:
        raise DataError(f"{where}: X1;Y1;X2;Y2 must be four integers, got {row}; correct the line") from None
    name = (row["Filename"] or "").replace("\\", "/")
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise DataError(f"{where}: {name!r} is outside {person}; correct the line")
    if any(left_out(part, skipped) for part in parts):
        return None
    path = person / name
    if not os.path.isfile(path):
        raise DataError(f"{where}: there is no file {str(path)!r}; add it or remove the line")
    real = os.path.realpath(path)
    linked = real != os.path.join(os.path.realpath(person), *parts)
    return _Frame(File(path, real, parts[:-1], linked), path.parent.name, (left, top, right, bottom))


def _thin(frames: list[_Frame], most: int | None) -> list[_Frame]:
    if most is None or len(frames) <= most:
        return frames
    return [frames[index] for index in np.linspace(0, len(frames) - 1, most).round().astype(int)]


def _split(frames: list[_Frame], fraction: float, person: str) -> tuple[list[_Frame], list[_Frame]]:
    """Cut a person's frames into train and test, neither empty, by whole videos if there are two or more."""
    videos = sorted({frame.video for frame in frames})
    wanted = fraction * len(frames)
    if len(videos) == 1:
        cut = len(frames) - min(max(1, round(wanted)), len(frames) - 1)
        return frames[:cut], frames[cut:]
    sizes = {video: sum(frame.video == video for frame in frames) for video in videos}
    generator = numpy_generator(_SPLIT_SEED, "youtube_faces", person)
    order = [videos[index] for index in generator.permutation(len(videos))]
    # Take videos while each brings the size of test closer to what is wanted; the first is the one that fits best.
    first = min(order, key=lambda video: abs(sizes[video] - wanted))
    chosen, size = {first}, sizes[first]
    for video in order:
        closer = abs(size + sizes[video] - wanted) < abs(size - wanted)
        if video not in chosen and closer and len(chosen) < len(videos) - 1:
            chosen.add(video)
            size += sizes[video]
    return [f for f in frames if f.video not in chosen], [f for f in frames if f.video in chosen]


def _decode(frames: list[tuple[_Frame, int]], image_size: int, names: tuple[str, ...]) -> ImageSet:
    items = (Encoded(str(frame.file.path), frame.file.path, frame.box) for frame, _ in frames)
    images = decode(items, len(frames), image_size)
    return ImageSet(images, np.array([label for _, label in frames], np.int64), names)
