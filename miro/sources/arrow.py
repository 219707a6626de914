"""Random access to the rows of Parquet files and of Hugging Face datasets' Arrow streams.

Few rows are in memory at a time: a range of rows is read from the row groups of a Parquet file that
contain it, or from the record batches of a memory-mapped Arrow stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from miro.sources.csv_jsonl import HEAD, TableRow

BATCH = 4096  # rows of a Parquet file read at a time
IMAGE_BATCH = 64  # the same where rows include images

_READ_ERRORS = (pa.ArrowException, OSError)


class _ArrowFile:
    """`rows`: their number; `columns`: their names."""

    def __init__(self, path: Path, schema: pa.Schema, rows: int):
        self.path = path
        self.rows = rows
        self.columns: list[str] = schema.names
        self._plain = [field.name for field in schema if _is_plain(field.type)]
        self._texts = {field.name for field in schema if _is_text(field.type)}

    @property
    def head(self) -> list[dict[str, Any]]:
        """The valid ones of the first rows, without binary columns."""
        rows = self._read(0, min(self.rows, HEAD), self._plain)
        return [row for row in rows if isinstance(row, dict)]

    def read(self, start: int, stop: int, image: str) -> Iterator[TableRow]:
        """Read the rows [start, stop): the image column, and all that JSON can represent.

        Invalid UTF-8 is decoded with "surrogateescape". A damaged row yields the reason instead.
        """
        return self._read(start, stop, list(dict.fromkeys([image, *self._plain])))

    def _read(self, start: int, stop: int, columns: list[str]) -> Iterator[TableRow]:
        try:
            for batch in self._batches(start, stop, columns):
                yield from self._rows_of(batch)
                start += batch.num_rows
        except _READ_ERRORS as error:
            if _is_system_error(error):
                raise
            yield from [_damaged(error)] * (stop - start)

    def _rows_of(self, batch: pa.RecordBatch) -> Iterator[TableRow]:
        cells: list[tuple[str, pa.Array, bool]] = []
        try:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                plain = _as_bytes(column)
                plain.validate(full=True)  # an offset out of bounds would crash the process
                cells.append((name, plain, name in self._texts))
        except pa.ArrowException as error:
            yield from [_damaged(error)] * batch.num_rows
            return
        for row in range(batch.num_rows):
            yield _row(cells, row)

    def _batches(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows [start, stop) in batches of any size."""
        raise NotImplementedError


class ParquetFile(_ArrowFile):
    """A Parquet file; raises ValueError if it is truncated or of another format."""

    def __init__(self, path: Path):
        try:
            with pq.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                schema = file.schema_arrow
        except _READ_ERRORS as error:
            raise _unreadable(path, "Parquet file", error) from None
        self._ends = list(accumulate(group.num_rows for group in groups))
        super().__init__(path, schema, self._ends[-1] if groups else 0)

    def _batches(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        firsts = [0, *self._ends]
        groups = [i for i, end in enumerate(self._ends) if firsts[i] < stop and start < end]
        if not groups:
            return
        row = firsts[groups[0]]
        size = BATCH if set(columns) <= set(self._plain) else IMAGE_BATCH
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(size, row_groups=groups, columns=columns):
                first, last = max(start - row, 0), min(stop - row, batch.num_rows)
                row += batch.num_rows
                if first < last:
                    yield batch.slice(first, last - first)
                if row >= stop:
                    return


class ArrowStream(_ArrowFile):
    """A `data-*.arrow` file; raises ValueError if it is truncated or of another format."""

    def __init__(self, path: Path):
        rows = 0
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                schema = stream.schema
                for batch in stream:
                    rows += batch.num_rows
        except _READ_ERRORS as error:
            raise _unreadable(path, "Arrow stream", error) from None
        super().__init__(path, schema, rows)

    def _batches(self, start: int, stop: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        row = 0
        with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                first, last = max(start - row, 0), min(stop - row, batch.num_rows)
                row += batch.num_rows
                if first < last:
                    yield batch.select(columns).slice(first, last - first)
                if row >= stop:
                    return


def _row(cells: list[tuple[str, pa.Array, bool]], number: int) -> TableRow:
    """One row as Python values; `cells` are (name, column, whether it is text)."""
    row: dict[str, Any] = {}
    for name, column, is_text in cells:
        try:
            value: Any = column[number].as_py()
        except UnicodeDecodeError:
            return f"the column {name!r} contains text that is not UTF-8"
        if is_text and value is not None:
            value = value.decode("utf-8", "surrogateescape")
        row[name] = value
    return row


def _as_bytes(column: pa.Array) -> pa.Array:
    """View a text column as binary, which may hold invalid UTF-8; return others unchanged."""
    if isinstance(column, pa.DictionaryArray):
        values = _as_bytes(column.dictionary)
        values.validate(full=True)
        return pa.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
    binary = _BINARY.get(column.type)
    return column if binary is None else column.view(binary)


_BINARY = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def _is_text(dtype: pa.DataType) -> bool:
    return (dtype.value_type if pa.types.is_dictionary(dtype) else dtype) in _BINARY


def _is_plain(dtype: pa.DataType) -> bool:
    """Whether JSON can represent the type: text, numbers, and lists and structs of them."""
    if pa.types.is_struct(dtype):
        return all(_is_plain(dtype.field(i).type) for i in range(dtype.num_fields))
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_dictionary(dtype):
        return _is_plain(dtype.value_type)
    tests = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    return dtype in _BINARY or any(test(dtype) for test in tests)


def _damaged(error: Exception) -> str:
    return f"this part of the file is damaged: {error}"


def _is_system_error(error: Exception) -> bool:
    """Whether the system raised the error, rather than the contents of the file."""
    return isinstance(error, OSError) and error.errno is not None


def _unreadable(path: Path, file_format: str, error: Exception) -> Exception:
    if _is_system_error(error):
        return error
    return ValueError(f"{path}: is not a complete {file_format} ({error}); copy it again")
