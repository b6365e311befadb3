"""One parquet file of encoded images and labels: checked from its metadata, read in small batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mea_ray.core.errors import DataError
from mea_ray.data.decode import Encoded
from mea_ray.data.files import is_lfs_pointer
from mea_ray.data.labels import Column, Names, column_of
from mea_ray.data.memory import check_memory

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMN = "label"
_BATCH_ROWS = 2048
_BATCH_BYTES = 2**26
_TEXTS = (pa.types.is_string, pa.types.is_large_string)
_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    lambda kind: str(kind) in {"string_view", "binary_view"},  # newer than the oldest pyarrow that is supported
)
_NUMBERS = (
    pa.types.is_integer,
    pa.types.is_boolean,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_null,
)
_UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)


@dataclass(frozen=True)
class ParquetTable:
    """One parquet file whose columns have been checked.

    Attributes:
        path: Its path.
        rows: Rows in it, at least 1.
        image: Name of the column of images.
        is_struct: Images are ``struct<bytes, path>`` rather than plain binary.
        batch_rows: Rows that are read at once.
        schema: Types and metadata of its columns.
    """

    path: Path
    rows: int
    image: str
    is_struct: bool
    batch_rows: int
    schema: pa.Schema

    def images(self) -> Iterator[Encoded]:
        """Yield the encoded images, row by row.

        Raises:
            DataError: The file is damaged, or a row has no image.
        """
        row = 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=self.batch_rows, columns=[self.image]):
                    column = batch.column(0)
                    for value in pc.struct_field(column, "bytes") if self.is_struct else column:
                        name = f"row {row} of {self.path}"
                        if not value.is_valid:
                            raise DataError(f"{name} holds no image bytes; embed the images in the file")
                        yield Encoded(name, value.as_py())
                        row += 1
        except _UNREADABLE as error:
            raise DataError(f"cannot read {self.path} after row {row}: {error}; replace the file") from None

    def labels(self, name: str) -> Column | str:
        """Read a column of labels.

        Whole numbers that are stored as floats or decimals (as pandas does beside missing ones) are integers, NaN is
        a missing label; true and false are 1 and 0, and bytes are text in UTF-8.

        Returns:
            The labels, or a sentence on why the file has none.

        Raises:
            DataError: The file is damaged, or its labels cannot be classes.
        """
        if self.schema.names.count(name) > 1:
            raise DataError(f"{self.path} has several columns {name!r}; rename them, or set data.label_column")
        if name not in self.schema.names:
            return (
                f"{self.path} has no column {name!r}, its columns are {', '.join(self.schema.names)}; set "
                "data.label_column"
            )
        kind = self.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        unusable = (
            f"{self.path}: labels in column {name!r} are {kind}, they must be integers or strings; set "
            "data.label_column"
        )
        if not any(is_kind(kind) for is_kind in (*_TEXTS, *_BYTES, *_NUMBERS)):
            return unusable
        texts = any(is_text(kind) for is_text in _TEXTS)
        try:
            column = pq.read_table(self.path, columns=[name], read_dictionary=[name] if texts else None).column(name)
            encoded = column.unify_dictionaries() if texts else _encoded(column.combine_chunks(), kind)
            if encoded is None:
                return f"{unusable}; some are neither whole numbers nor UTF-8 text"
            values, rows = _distinct(encoded)
        except _UNREADABLE as error:
            raise DataError(f"cannot read {self.path} as parquet: {error}; replace the file") from None
        return column_of(str(self.path), name, values, rows, _hub_names(self.schema, name))


def open_table(path: Path, image_column: str | None) -> ParquetTable:
    """Check a file's columns, from its metadata only.

    Args:
        path: The file.
        image_column: Column of images; None finds ``img`` or ``image``.

    Raises:
        DataError: It is not a parquet file, is empty, or has no column of encoded images.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            image = _image_column(path, schema, image_column)
            batch_rows = _batch_rows(metadata)
    except _UNREADABLE as error:
        if is_lfs_pointer(path):
            raise DataError(f"{path} is a pointer of Git LFS; run `git lfs pull` to download the file") from None
        raise DataError(f"cannot read {path} as parquet: {error}; replace the file") from None
    kind = schema.field(image).type
    is_struct = pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind)
    if not is_struct and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"{path}: column {image!r} is {kind}, it must hold encoded images as struct<bytes, path> or binary; "
            "set data.image_column"
        )
    if metadata.num_rows < 1:
        raise DataError(f"{path} has no rows; remove the file")
    return ParquetTable(path, metadata.num_rows, image, is_struct, batch_rows, schema)


def _image_column(path: Path, schema: pa.Schema, wanted: str | None) -> str:
    candidates = IMAGE_COLUMNS if wanted is None else (wanted,)
    if len(there := [name for name in candidates if name in schema.names]) > 1:
        raise DataError(
            f"{path} has the columns {' and '.join(map(repr, there))}; set data.image_column to one of them"
        )
    for name in candidates:
        if schema.names.count(name) > 1:
            raise DataError(f"{path} has several columns {name!r}; rename them, or set data.image_column")
        if name in schema.names:
            return name
    raise DataError(
        f"{path} has no image column {' or '.join(map(repr, candidates))}, its columns are {', '.join(schema.names)}; "
        "set data.image_column"
    )


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Return how many rows may be read at once.

    Equal images may be stored once, so that one row may be as large as its whole row group.
    """
    # The sizes of single columns would be closer, but pyarrow aborts the process on damaged ones.
    largest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=1)
    check_memory("the rows of a group", largest, "write the file with smaller groups of rows")
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))


def _encoded(column: pa.Array, kind: pa.DataType) -> pa.DictionaryArray | None:
    """Encode labels not stored as text as a dictionary of integers or text; None if that is impossible."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    try:
        if any(is_bytes(kind) for is_bytes in _BYTES):
            plain = plain.cast(pa.binary()).cast(pa.string())
        elif pa.types.is_floating(kind):
            plain = pc.if_else(pc.is_nan(plain), pa.scalar(None, kind), plain).cast(pa.int64())
        elif not pa.types.is_integer(kind):
            plain = plain.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return plain.dictionary_encode()


def _distinct(encoded: pa.ChunkedArray) -> tuple[list[int] | list[str], np.ndarray]:
    chunks = encoded.chunks if isinstance(encoded, pa.ChunkedArray) else [encoded]
    rows = [chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in chunks]
    return chunks[0].dictionary.to_pylist(), np.concatenate(rows).astype(np.int64)


def _hub_names(schema: pa.Schema, label_column: str) -> Names:
    """Return the class names in the hub's metadata, or nothing."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
