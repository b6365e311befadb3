"""Image tables in parquet files, as dataset hubs lay them out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, Images, ImageSet, Labels
from mea_ray.data.decode import Encoded, assemble, check_fraction, check_image_size, decode
from mea_ray.data.splits import stratified

_IMAGE_COLUMNS = ("img", "image")
_TEST_NAMES = ("test", "validation", "valid", "val")
_BATCH_ROWS = 2048
_SPLIT_SEED = 0


@dataclass(frozen=True)
class _Table:
    """One checked parquet file.

    Attributes:
        path: Where it lies.
        rows: Rows in it.
        image: Name of the image column.
        is_struct: Images are ``struct<bytes, path>`` rather than plain binary.
        labels: Integers or strings, shape (rows,).
        class_names: From the hub's metadata; empty when it holds none.
    """

    path: Path
    rows: int
    image: str
    is_struct: bool
    labels: np.ndarray
    class_names: tuple[str, ...]


def load(
    *,
    path: str | tuple[str, ...] = "",
    image_column: str | None = None,
    label_column: str = "label",
    class_names: tuple[str, ...] | None = None,
    image_size: int | None = None,
    test_fraction: float | None = None,
) -> Dataset:
    """Load a classification dataset from parquet files that hold encoded images.

    In a folder, files called ``train-*.parquet`` or lying in a folder ``train`` are train, the same with ``test`` (or
    else ``validation``, ``valid``, ``val``) are test, however deep: ``data/`` of a hub's repository, its cache, and its
    automatic conversion all load.

    Args:
        path: Folder, file, or several files.
        image_column: Column of images, ``struct<bytes, path>`` or binary; null finds ``img`` or ``image``.
        label_column: Column of labels, integers from 0 or strings.
        class_names: One name per class; null takes them from the hub's metadata in the file, else from string labels,
            else numbers the classes.
        image_size: Images are resized to this shorter side and cropped to the middle square; null keeps their size,
            which must then be the same for all.
        test_fraction: Part of train that becomes test, stratified, when there is no test file.

    Returns:
        Images of shape (1, H, W) when all are grey, else (3, H, W).

    Raises:
        ConfigError: An option is missing or out of range.
        DataError: Files, columns or labels are missing or of the wrong type, or an image is damaged.
    """
    check_image_size(image_size)
    check_fraction("test_fraction", test_fraction)
    train_files, test_files = _find(path, test_fraction)
    tables = [_read(file, image_column, label_column) for file in (*train_files, *test_files)]
    names, labels = _labels(tables, label_column, class_names)
    split = len(train_files)
    train, train_labels = _decode(tables[:split], image_size), np.concatenate(labels[:split])
    if test_files:
        test, test_labels = _decode(tables[split:], image_size), np.concatenate(labels[split:])
        return assemble("parquet", train, train_labels, test, test_labels, names)
    assert test_fraction is not None
    everything = ImageSet(train, train_labels, names)
    kept, held_out = stratified(everything, np.arange(len(train)), test_fraction, _SPLIT_SEED, "test")
    return Dataset("parquet", everything.take(kept), everything.take(held_out))


def _find(path: str | tuple[str, ...], test_fraction: float | None) -> tuple[list[Path], list[Path]]:
    """Return the files of train and of test."""
    given = [Path(p).expanduser() for p in ((path,) if isinstance(path, str) else path) if p]
    if not given:
        raise ConfigError("data.path is empty; give a folder or files, e.g. data.path=/data/cifar10")
    for entry in given:
        if not entry.exists():
            raise DataError(f"there is no file or folder {str(entry)!r}; check data.path")
    single = len(given) == 1 and given[0].is_file()
    files = [file for entry in given for file in (sorted(entry.rglob("*.parquet")) if entry.is_dir() else [entry])]
    base = given[0] if len(given) == 1 and given[0].is_dir() else None
    train = [file for file in files if _belongs(file, base, "train")] or (files if single else [])
    test: list[Path] = []
    for name in _TEST_NAMES:
        test = test or [file for file in files if file not in train and _belongs(file, base, name)]
    where = ", ".join(map(str, given))
    if not train:
        raise DataError(f"no train-*.parquet among the {len(files)} parquet files in {where}; check data.path")
    if not test and test_fraction is None:
        raise DataError(f"no test-*.parquet in {where}; add one, or set data.test_fraction to cut test off train")
    for part in (train, test):
        folders = {file.parent for file in part}
        if base is not None and len(folders) > 1:
            shown = ", ".join(sorted(str(folder) for folder in folders))
            raise DataError(f"several datasets lie in {where}: {shown}; set data.path to one of them")
    return train, test


def _belongs(file: Path, base: Path | None, split: str) -> bool:
    inner = file.relative_to(base).parts[:-1] if base is not None else (file.parent.name,)
    return re.match(rf"{split}($|[-_.0-9])", file.stem) is not None or split in inner


def _read(path: Path, image_column: str | None, label_column: str) -> _Table:
    """Check one file's columns and read its labels."""
    try:
        schema = pq.read_schema(path)
        image = _image_column(path, schema, image_column)
        kind = schema.field(image).type
        if label_column not in schema.names:
            raise DataError(
                f"{path} has no column {label_column!r}, its columns are {', '.join(schema.names)}; "
                "set data.label_column"
            )
        column = pq.read_table(path, columns=[label_column]).column(label_column)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as parquet: {error}; replace the file") from None
    is_struct = pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind)
    if not is_struct and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"{path}: column {image!r} is {kind}, it must hold encoded images as struct<bytes, path> or binary; "
            "set data.image_column"
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    texts = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not texts and not pa.types.is_integer(column.type):
        raise DataError(
            f"{path}: labels in column {label_column!r} are {column.type}, they must be integers or strings; "
            "set data.label_column"
        )
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(
            f"{path}: row {row} of column {label_column!r} has no label; drop the {column.null_count} rows without"
        )
    if not len(column):
        raise DataError(f"{path} has no rows; remove the file")
    return _Table(path, len(column), image, is_struct, column.to_numpy(), _hub_names(schema, label_column))


def _image_column(path: Path, schema: pa.Schema, wanted: str | None) -> str:
    candidates = _IMAGE_COLUMNS if wanted is None else (wanted,)
    for name in candidates:
        if name in schema.names:
            return name
    raise DataError(
        f"{path} has no image column {' or '.join(map(repr, candidates))}, its columns are {', '.join(schema.names)}; "
        "set data.image_column"
    )


def _hub_names(schema: pa.Schema, label_column: str) -> tuple[str, ...]:
    """Return the class names in the hub's metadata, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label_column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _labels(tables: list[_Table], column: str, wanted: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[Labels]]:
    """Return class names and, per table, int64 labels in [0, classes)."""
    kinds = {table.labels.dtype.kind in "iu" for table in tables}
    if len(kinds) > 1:
        raise DataError(f"labels in column {column!r} are integers in some files and strings in others; use one type")
    if kinds == {True}:
        lowest = min(int(table.labels.min()) for table in tables)
        highest = max(int(table.labels.max()) for table in tables)
        names = wanted or tables[0].class_names or tuple(map(str, range(highest + 1)))
        if lowest < 0 or highest >= len(names):
            raise DataError(
                f"labels in column {column!r} go from {lowest} to {highest}, with {len(names)} class names they must "
                f"lie in [0, {len(names)}); a hub marks unlabelled rows with -1: use a split that has labels"
            )
        return names, [table.labels.astype(np.int64) for table in tables]
    found = {str(label) for table in tables for label in np.unique(table.labels)}
    names = wanted or tuple(sorted(found))
    if unknown := sorted(found - set(names)):
        raise DataError(f"label {unknown[0]!r} in column {column!r} is not among data.class_names {list(names)}")
    index = {name: position for position, name in enumerate(names)}
    return names, [np.array([index[str(label)] for label in table.labels], np.int64) for table in tables]


def _decode(tables: list[_Table], image_size: int | None) -> Images:
    def items() -> Iterator[Encoded]:
        for table in tables:
            yield from _items(table)

    return decode(items(), sum(table.rows for table in tables), image_size)


def _items(table: _Table) -> Iterator[Encoded]:
    row = 0
    try:
        with pq.ParquetFile(table.path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[table.image]):
                column = batch.column(0)
                for data in (pc.struct_field(column, "bytes") if table.is_struct else column).to_pylist():
                    name = f"row {row} of {table.path}"
                    if data is None:
                        raise DataError(f"{name} holds no image bytes; embed the images in the file")
                    yield Encoded(name, data)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {table.path} after row {row}: {error}; replace the file") from None
