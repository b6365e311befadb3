"""Images in parquet files, as dataset hubs publish them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, ImageSet, Labels
from mea_ray.data.assemble import assemble, cut, pool
from mea_ray.data.decode import decode, decode_one
from mea_ray.data.files import File, expanded, walk, without_second_links
from mea_ray.data.labels import Column, Names, unify
from mea_ray.data.memory import check_memory
from mea_ray.data.options import Fraction, ImageSize
from mea_ray.data.parts import Part, check_copies, check_shards, parts_of, without_shard
from mea_ray.data.skipped import Skipped, warn
from mea_ray.data.tables import LABEL_COLUMN, ParquetTable, open_table

NAME = "parquet"
SUFFIXES = frozenset({".parquet", ".parq", ".pq"})
_TEST_PARTS: tuple[Part, ...] = ("test", "validation")
_BOMB_BYTES = 2**30
_BOMB_RATIO = 2000
"""Most bytes of pixels for each byte of a file larger than ``_BOMB_BYTES``; no real image dataset reaches it."""


def load(
    *,
    path: str | tuple[str, ...] = "",
    image_column: str | None = None,
    label_column: str = LABEL_COLUMN,
    class_names: tuple[str, ...] | None = None,
    image_size: ImageSize | None = None,
    test_fraction: Fraction | None = None,
) -> Dataset:
    """Load encoded images from parquet files.

    Choose it for datasets of hubs such as Hugging Face.

    In a folder, files called ``train-*.parquet`` or in a folder ``train``, however deep, are train. Test is recognised
    in the same way by ``test``, or else by ``validation``, ``valid`` or ``val``. A hub's ``data/`` folder, its cache
    and its automatic conversion all load. Case and additions do not matter (``Train``, ``testing``,
    ``train_images``). Of files numbered ``-00000-of-00005`` none may be missing. If no file or folder is named after a
    part, all files are train. ``validation`` is used if ``test`` has no labels. Images without labels, or without a
    test part, load as a thief's pool (``splits.thief_pool``) and not as ``data``.

    Hidden files and folders are never read. What else was left out is counted in a warning. Pictures are turned as
    their EXIF orientation says, transparent pixels are put on white, and of an animation the first frame is read.
    ``mea_ray.data.decode`` lists the formats and limits.

    Args:
        path: Folder, file, or several files. Listed files are read as they are; missing shards cause a warning only.
        image_column: Column of images, ``struct<bytes, path>`` or binary; null finds ``img`` or ``image``.
        label_column: Column of labels, integers or strings; null, NaN or -1 for an image without a label.
        class_names: One name per class; null takes them from the hub's metadata in each file, else from string labels,
            else from the numbers. Names decide: files that name their classes in another order agree by name, and so
            does this list if it holds the files' names.
        image_size: Images are resized to this shorter side and cropped to the middle square; null keeps their size,
            which must then be the same for all.
        test_fraction: Fraction of train that becomes test, stratified, when there is no test file.

    Returns:
        Images of shape (1, H, W) when all are grey, else (3, H, W). Classes without an image are left out.

    Raises:
        ConfigError: ``path`` is missing.
        DataError: Files or columns are missing or of the wrong type, labels contradict each other, an image is damaged,
            or the images do not fit into memory.
    """
    skipped = Skipped()
    where, files = _find(path, skipped)

    def read(part: Part) -> _Part:
        return _read(files[part], image_column, label_column, image_size)

    train = read("train")
    test, lacking = None, ""
    for part in [part for part in _TEST_PARTS if part in files]:
        if test is not None:
            skipped.add("files of a second test part", part, len(files[part]))
            continue
        tried = read(part)
        if not tried.missing:
            test = tried
        lacking = lacking or tried.missing
    skipped.warn(f"{NAME}: {where}")
    if test is not None and lacking:
        warn(f"{NAME}: {lacking}; {test.tables[0].path} is the test part instead")

    if train.missing or test is None:
        names, labels = unify(train.columns, class_names)
        images = train.decoded(names, labels, image_size)
        if not train.missing and test_fraction is not None:
            return cut(NAME, images, test_fraction, where)
        lacking = lacking or f"there is no test-*.parquet in {where}; add one"
        return pool(NAME, images, train.missing or f"{lacking}, or set data.test_fraction to cut test off train")
    names, labels = unify([*train.columns, *test.columns], class_names)
    count = len(train.columns)
    train_images = train.decoded(names, labels[:count], image_size)
    return assemble(NAME, train_images, test.decoded(names, labels[count:], image_size), where)


@dataclass(frozen=True)
class _Part:
    """The tables of one part.

    Attributes:
        tables: The files.
        columns: Their labels.
        missing: Why images have no labels; empty if all have.
    """

    tables: list[ParquetTable]
    columns: list[Column]
    missing: str

    def decoded(self, names: Names, labels: Sequence[Labels], image_size: int | None) -> ImageSet:
        """Decode all images."""
        items = chain.from_iterable(table.images() for table in self.tables)
        images = decode(items, sum(table.rows for table in self.tables), image_size)
        known = np.concatenate(labels)
        if len(known) != len(images):
            raise DataError(
                f"{self.tables[0].path} and its shards hold {len(images):,} images and {len(known):,} labels; replace "
                "the files"
            )
        return ImageSet(images, known, names)


def _find(path: str | tuple[str, ...], skipped: Skipped) -> tuple[str, dict[Part, list[Path]]]:
    """Return where the files are, for messages, and the files of each part; of train at least one."""
    given = [expanded(p) for p in ((path,) if isinstance(path, str) else path) if p]
    if not given:
        raise ConfigError("data.path is empty; give a folder or files, e.g. data.path=/data/cifar10")
    where = ", ".join(map(str, given))
    listed: list[File] = []
    for entry in given:
        if entry.is_dir():
            listed += walk(entry, SUFFIXES, skipped).files
        elif entry.exists():
            listed.append(File(entry, str(entry.resolve()), (entry.parent.name,), linked=False))
        else:
            raise DataError(f"there is no file or folder {str(entry)!r}; check data.path")
    if not listed:
        left_out = f" (not read: {skipped})" if str(skipped) else ""
        raise DataError(f"there are no parquet files in {where}{left_out}; check data.path")
    alone = len(given) == 1 and not given[0].is_dir()
    parts: dict[Part, list[File]] = {"train": listed} if alone else _by_part(listed, skipped)
    if "train" not in parts:
        raise DataError(
            f"none of the {len(listed)} parquet files in {where} is train by its name or folder, as train-*.parquet "
            "is; rename them, or set data.path to the file of train"
        )
    in_one_folder = len(given) == 1 and not alone
    if in_one_folder:
        _check_one_dataset(parts)
    files: dict[Part, list[Path]] = {}
    for part, members in parts.items():
        files[part] = [file.path for file in without_second_links(members, skipped)]
        if in_one_folder:
            _check_one_folder(where, files[part])
        check_shards(files[part], listed=not in_one_folder)
        check_copies(files[part], listed=not in_one_folder)
    return where, files


def _by_part(files: list[File], skipped: Skipped) -> dict[Part, list[File]]:
    """Sort files by part, by their own names or else by the nearest folder's; all are train if no name is of a part."""
    folders = parts_of({name for file in files for name in file.folders})
    stems = parts_of({without_shard(file.path.stem) for file in files}, prefixes=True)
    parts: dict[Part, list[File]] = {}
    others = []
    for file in files:
        own = stems.get(without_shard(file.path.stem))
        part = own or next((folders[name] for name in reversed(file.folders) if name in folders), None)
        if part is None:
            others.append(file)
        else:
            parts.setdefault(part, []).append(file)
    if not parts:
        return {"train": others}
    for file in others:
        skipped.add("files of no part", file.path.name)
    return parts


def _check_one_dataset(parts: dict[Part, list[File]]) -> None:
    """Refuse ``a/train.parquet`` beside ``b/test.parquet``: nothing says that they are parts of one dataset."""
    names = parts_of({name for files in parts.values() for file in files for name in file.folders})
    above = {part: tuple(n for n in files[0].folders if n not in names) for part, files in parts.items()}
    for part, folders in above.items():
        shared = min(len(folders), len(above["train"]))
        if folders[:shared] != above["train"][:shared]:
            raise DataError(
                f"{parts['train'][0].path} and {parts[part][0].path} lie in the folders of different datasets; set "
                "data.path to one of them, or list the files of both in data.path"
            )


def _check_one_folder(where: str, files: list[Path]) -> None:
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise DataError(f"several datasets are in {where}: {', '.join(folders)}; set data.path to one of them")


def _read(files: list[Path], image_column: str | None, label_column: str, image_size: int | None) -> _Part:
    """Check the files of a part and read their labels.

    Raises:
        DataError: A file is not a table of images, a column that the config names is missing, or memory is short.
    """
    tables = [open_table(file, image_column) for file in files]
    _check_size(tables, image_size)
    columns, missing = [], ""
    for table in tables:
        column = table.labels(label_column)
        if isinstance(column, str):
            if label_column != LABEL_COLUMN:
                raise DataError(column)
            missing = missing or column
            if label_column in table.schema.names:
                warn(f"{NAME}: {column}; the images are read without labels")
            column = Column(str(table.path), label_column, (), np.full(table.rows, -1, np.int64), ())
        elif column.unlabelled:
            missing = missing or (
                f"{column.unlabelled:,} of the {table.rows:,} rows of {table.path} have no label (null or -1) in "
                f"column {label_column!r}; drop them, or use a split that has labels"
            )
        columns.append(column)
    return _Part(tables, columns, missing)


def _check_size(tables: list[ParquetTable], image_size: int | None) -> None:
    """Refuse what would not fit into memory, by the number of rows and the first image, before anything else is read.

    Raises:
        DataError: It does not fit, or a small file would become an absurd amount of pixels.
    """
    first = next(tables[0].images(), None)
    if first is None:
        raise DataError(
            f"{tables[0].path} holds none of the {tables[0].rows:,} rows that it declares; replace the file"
        )
    shape = decode_one(first, image_size)[0].shape
    rows, stored = sum(table.rows for table in tables), sum(table.path.stat().st_size for table in tables)
    what = f"the {rows:,} images of {shape[2]} x {shape[1]} pixels in {tables[0].path.parent}"
    needed = rows * int(np.prod(shape))
    remedy = "set a smaller data.image_size or load fewer images"
    check_memory(what, needed + rows * np.dtype(np.int64).itemsize, remedy)
    if needed > max(_BOMB_BYTES, _BOMB_RATIO * stored):
        raise DataError(
            f"{what} would take {needed / 2**30:,.1f} GiB, more than {_BOMB_RATIO:,} times the {stored:,} bytes of the "
            f"files, which no real dataset reaches; {remedy}"
        )
