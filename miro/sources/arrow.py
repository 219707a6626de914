"""Rows of Parquet files and of Arrow streams, as Hugging Face datasets write them to disk.

Only a few rows are in memory at a time, and only what lies near a row is read to get at it: the row
groups of a Parquet file, the batches of an Arrow stream through a memory map.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miro.sources.csv_jsonl import HEAD, Row

BATCH, FEW = 4096, 64  # rows of a Parquet file at a time; few where they hold images

_DAMAGE = (pa.ArrowException, OSError)


class _ArrowFile:
    """`rows`: how many there are; `columns`: their names."""

    def __init__(self, path: Path, schema: pa.Schema, rows: int):
        self.path = path
        self.rows = rows
        self.columns: list[str] = schema.names
        self._plain = [field.name for field in schema if _is_plain(field.type)]
        self._texts = {field.name for field in schema if _is_text(field.type)}

    @property
    def head(self) -> list[dict[str, Any]]:
        """The first rows that can be read, without their images."""
        rows = self._read(0, min(self.rows, HEAD), self._plain)
        return [row for row in rows if isinstance(row, dict)]

    def read(self, start: int, stop: int, image: str) -> Iterator[Row]:
        """The rows from `start` to before `stop`: their images, texts and numbers.

        Text keeps bytes that are not UTF-8 ("surrogateescape"). A row that is damaged says so.
        """
        return self._read(start, stop, list(dict.fromkeys([image, *self._plain])))

    def _read(self, start: int, stop: int, columns: list[str]) -> Iterator[Row]:
        try:
            for batch in self._batches(start, stop, columns):
                yield from self._rows_of(batch)
                start += batch.num_rows
        except _DAMAGE as error:
            if _is_of_the_disk(error):
                raise
            yield from [_damaged(error)] * (stop - start)

    def _rows_of(self, batch: pa.RecordBatch) -> Iterator[Row]:
        cells: list[tuple[str, pa.Array, bool]] = []
        try:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                plain = _as_bytes(column)
                plain.validate(full=True)  # an offset that leads outside would crash the process
                cells.append((name, plain, name in self._texts))
        except pa.ArrowException as error:
            yield from [_damaged(error)] * batch.num_rows
            return
        for row in range(batch.num_rows):
            yield _row(cells, row)

    def _batches(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows from `start` to before `stop`, in batches of any size."""
        raise NotImplementedError


class ParquetFile(_ArrowFile):
    """A Parquet file; ValueError where it is none, or is cut short."""

    def __init__(self, path: Path):
        try:
            with pq.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                schema = file.schema_arrow
        except _DAMAGE as error:
            raise _unreadable(path, "a whole Parquet file", error) from None
        self._ends = list(accumulate(group.num_rows for group in groups))
        super().__init__(path, schema, self._ends[-1] if groups else 0)

    def _batches(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        firsts = [0, *self._ends]
        groups = [i for i, end in enumerate(self._ends) if firsts[i] < stop and start < end]
        if not groups:
            return
        at = firsts[groups[0]]
        size = BATCH if set(columns) <= set(self._plain) else FEW
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(size, row_groups=groups, columns=columns):
                first, last = max(start - at, 0), min(stop - at, batch.num_rows)
                at += batch.num_rows
                if first < last:
                    yield batch.slice(first, last - first)
                if at >= stop:
                    return


class ArrowStream(_ArrowFile):
    """A `data-*.arrow` file; ValueError where it is none, or is cut short."""

    def __init__(self, path: Path):
        rows = 0
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                schema = stream.schema
                for batch in stream:
                    rows += batch.num_rows
        except _DAMAGE as error:
            raise _unreadable(path, "a whole Arrow stream", error) from None
        super().__init__(path, schema, rows)

    def _batches(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        at = 0
        with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                first, last = max(start - at, 0), min(stop - at, batch.num_rows)
                at += batch.num_rows
                if first < last:
                    yield batch.select(columns).slice(first, last - first)
                if at >= stop:
                    return


def _row(cells: list[tuple[str, pa.Array, bool]], number: int) -> Row:
    """The cells of one row of (name, column, whether it is text) as Python values."""
    row: dict[str, Any] = {}
    for name, column, is_text in cells:
        try:
            value: Any = column[number].as_py()
        except UnicodeDecodeError:
            return f"the column {name!r} holds text that is not UTF-8"
        if is_text and value is not None:
            value = value.decode("utf-8", "surrogateescape")
        row[name] = value
    return row


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text as its bytes, which unlike text may be anything; other columns as they are."""
    if isinstance(column, pa.DictionaryArray):
        values = _as_bytes(column.dictionary)
        values.validate(full=True)
        return pa.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
    kind = _BYTES.get(column.type)
    return column if kind is None else column.view(kind)


_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def _is_string(kind: pa.DataType) -> bool:
    return kind in _BYTES


def _is_text(kind: pa.DataType) -> bool:
    return _is_string(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _is_plain(kind: pa.DataType) -> bool:
    """Whether JSON has it too: texts, numbers, lists and objects of these."""
    if pa.types.is_struct(kind):
        return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    tests = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    return _is_string(kind) or any(test(kind) for test in tests)


def _damaged(error: Exception) -> str:
    return f"this part of the file is damaged: {error}"


def _is_of_the_disk(error: Exception) -> bool:
    """Whether an error came from the system, and not from what stands in the file."""
    return isinstance(error, OSError) and error.errno is not None


def _unreadable(path: Path, what: str, error: Exception) -> Exception:
    if _is_of_the_disk(error):
        return error
    return ValueError(f"{path}: is not {what} ({error}); copy it again")
