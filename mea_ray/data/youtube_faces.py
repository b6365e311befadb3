"""YouTube Faces: frames of videos of people, aligned on the face, with a table of boxes per person."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Dataset, Images, Labels
from mea_ray.data.decode import Encoded, assemble, check_fraction, check_image_size, decode

_FOLDER = "aligned_images_DB"
_COLUMNS = ("Filename", "X1", "Y1", "X2", "Y2")
_SPLIT_SEED = 0


@dataclass(frozen=True)
class _Frame:
    path: Path
    video: str
    box: tuple[int, int, int, int] | None


def load(
    *,
    path: str = "",
    image_size: int = 64,
    crop: Literal["box", "full"] = "box",
    min_images: int = 100,
    max_images_per_class: int | None = None,
    test_fraction: float = 0.2,
) -> Dataset:
    """Load ``<person>/<video>/*.jpg`` with ``<person>/<person>.csv``; a person is a class.

    The table is separated by semicolons and has the columns ``Filename`` (``<video>/<frame>.jpg``), ``X1``, ``Y1``,
    ``X2``, ``Y2`` (corners of the face in pixels); others are ignored. It is the layout that the authors of
    MEA-Defender read.

    Frames of one video are nearly the same picture, so test gets whole videos where a person has two or more, as many
    as come closest to its fraction. Of a person with one video, test gets its last frames.

    Args:
        path: Folder of the persons, or the folder above (holding ``aligned_images_DB``).
        image_size: Shorter sides are resized to it, in pixels, and the middle square is cut out.
        crop: ``box`` cuts out the face first; ``full`` takes the whole frame and needs no tables.
        min_images: Persons with fewer frames are dropped. At least 2.
        max_images_per_class: So many frames of a person at most, evenly spaced over all of them; null takes all.
        test_fraction: Part of each person's frames that is test.

    Returns:
        Images of shape (3, image_size, image_size), or (1, image_size, image_size) when all are grey. Classes are the
        sorted names of the persons.

    Raises:
        ConfigError: An option is missing or out of range.
        DataError: Folders, tables or files are missing, a table is malformed, an image is damaged, or fewer than two
            persons have ``min_images`` frames.
    """
    check_image_size(image_size)
    check_fraction("test_fraction", test_fraction)
    if min_images < 2 or (max_images_per_class is not None and max_images_per_class < 2):
        raise ConfigError(
            f"data.min_images={min_images} and data.max_images_per_class={max_images_per_class} must be at least 2: "
            "one frame for train, one for test"
        )
    if not path:
        raise ConfigError("data.path is empty; give the folder of YouTube Faces, e.g. data.path=/data/youtube_faces")
    root = Path(path).expanduser()
    root = root / _FOLDER if (root / _FOLDER).is_dir() else root
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}; check data.path")

    persons = {
        person.name: frames
        for person in sorted(entry for entry in root.iterdir() if entry.is_dir())
        if len(frames := _frames(person, crop)) >= min_images
    }
    if len(persons) < 2:
        raise DataError(
            f"{len(persons)} persons in {root} have {min_images} frames or more, a classifier needs 2; lower "
            "data.min_images or check data.path"
        )
    train: list[tuple[_Frame, int]] = []
    test: list[tuple[_Frame, int]] = []
    for label, (name, frames) in enumerate(persons.items()):
        kept, held_out = _split(_thin(frames, max_images_per_class), test_fraction, name)
        train += [(frame, label) for frame in kept]
        test += [(frame, label) for frame in held_out]
    return assemble("youtube_faces", *_decode(train, image_size), *_decode(test, image_size), tuple(persons))


def _frames(person: Path, crop: str) -> list[_Frame]:
    """List a person's frames, by video and name."""
    if crop == "full":
        files = sorted(person.glob("*/*.jpg"))
        return [_Frame(file, file.parent.name, None) for file in files]
    table = person / f"{person.name}.csv"
    if not table.is_file():
        raise DataError(
            f"there is no table of boxes {str(table)!r} (Filename;Width;Height;X1;Y1;X2;Y2); add it, or set "
            "data.crop=full to use whole frames"
        )
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=";")
        if missing := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
            raise DataError(
                f"{table} lacks the columns {', '.join(missing)}; its first line must read "
                "Filename;Width;Height;X1;Y1;X2;Y2"
            )
        frames = [_row(person, table, reader.line_num, row) for row in reader]
    return sorted(frames, key=lambda frame: frame.path)


def _row(person: Path, table: Path, line: int, row: dict[str, str]) -> _Frame:
    try:
        left, top, right, bottom = (int(row[column]) for column in _COLUMNS[1:])
    except (TypeError, ValueError):
        raise DataError(
            f"{table}, line {line}: X1;Y1;X2;Y2 must be four integers, got {row}; correct the line"
        ) from None
    name = row["Filename"].replace("\\", "/")
    path = person / name
    if person.resolve() not in path.resolve().parents:
        raise DataError(f"{table}, line {line}: {name!r} lies outside {person}; correct the line")
    if not path.is_file():
        raise DataError(f"{table}, line {line}: there is no file {str(path)!r}; add it or remove the line")
    return _Frame(path, path.parent.name, (left, top, right, bottom))


def _thin(frames: list[_Frame], most: int | None) -> list[_Frame]:
    if most is None or len(frames) <= most:
        return frames
    return [frames[index] for index in np.linspace(0, len(frames) - 1, most).round().astype(int)]


def _split(frames: list[_Frame], fraction: float, person: str) -> tuple[list[_Frame], list[_Frame]]:
    """Cut a person's frames into train and test, both non-empty, by whole videos where there are two or more."""
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


def _decode(frames: list[tuple[_Frame, int]], image_size: int) -> tuple[Images, Labels]:
    items = (Encoded(str(frame.path), frame.path, frame.box) for frame, _ in frames)
    return decode(items, len(frames), image_size), np.array([label for _, label in frames], np.int64)
