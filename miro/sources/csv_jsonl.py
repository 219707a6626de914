"""Random access to the rows of CSV, TSV and JSON Lines files; a bad row affects no other.

Opening a file scans it once and records the byte offset of every thousandth row, so that a range of
rows can be read without scanning from the start.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from miro.sources.sample import MAX_CAPTION_BYTES, MAX_JSON_BYTES, read_json

STRIDE = 1000  # rows between recorded offsets
HEAD = 100  # rows examined to find the columns
BOM = b"\xef\xbb\xbf"

Raw = TypeVar("Raw")
TableRow = dict[str, Any] | str
"""The cells by column, or why the row cannot be read."""


class _Lines:
    """Lines of a binary file from an offset on; `offset` is that of the next line.

    Lines are truncated to MAX_JSON_BYTES + 1 bytes, enough to recognise one that is too long.
    """

    def __init__(self, file: IO[bytes], offset: int):
        self.offset = offset
        self._file = file
        file.seek(offset)

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(MAX_JSON_BYTES + 1):
            self.offset += len(line)
            rest = line
            while not rest.endswith(b"\n") and (rest := self._file.readline(MAX_JSON_BYTES)):
                self.offset += len(rest)
            yield line


class _TextFile(Generic[Raw]):
    """`rows`: their number; `columns`: their names; `head`: the valid ones of the first rows."""

    columns: list[str]

    def __init__(self, path: Path, start: int):
        self.path = path
        self.head: list[dict[str, Any]] = []
        self.rows = 0
        self._starts: list[int] = []
        for offset, raw in self._scan(start):
            if self.rows % STRIDE == 0:
                self._starts.append(offset)
            if self.rows < HEAD and isinstance(row := self._parse(raw), dict):
                self.head.append(row)
            self.rows += 1

    def read(self, start: int, stop: int, image: str) -> Iterator[TableRow]:
        """Read the rows [start, stop), all columns."""
        skip = start % STRIDE
        rows = self._scan(self._starts[start // STRIDE])
        for _, raw in itertools.islice(rows, skip, skip + stop - start):
            yield self._parse(raw)

    def _scan(self, offset: int) -> Iterator[tuple[int, Raw]]:
        """Yield (byte offset, raw row) of each row from an offset on."""
        raise NotImplementedError

    def _parse(self, raw: Raw) -> TableRow:
        raise NotImplementedError


class DelimitedFile(_TextFile[list[str] | str]):
    """A CSV or TSV file with a header; cells are text, or None if empty.

    Invalid UTF-8 is decoded with "surrogateescape": file names may contain it, and captions are
    rejected with the offending byte.
    """

    def __init__(self, path: Path):
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        with open(path, "rb") as file:
            first = file.read(len(BOM))
            if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{path}: is UTF-16; save it as UTF-8")
            lines = _Lines(file, len(BOM) if first == BOM else 0)
            header = next(self._records(lines), "the file is empty")
        if isinstance(header, str):
            raise ValueError(f"{path}: its header cannot be read: {header}")
        self.columns = header
        super().__init__(path, lines.offset)

    def _records(self, lines: _Lines) -> Iterator[list[str] | str]:
        """Yield the cells of each record, or why it cannot be read; empty lines are skipped."""
        csv.field_size_limit(MAX_CAPTION_BYTES)  # also bounds a quotation that is never closed
        text = (line.decode("utf-8", "surrogateescape") for line in lines)
        reader = csv.reader(text, delimiter=self._delimiter, strict=True)
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _csv_problem(str(error))
            else:
                if record:
                    yield record

    def _scan(self, offset: int) -> Iterator[tuple[int, list[str] | str]]:
        with open(self.path, "rb") as file:
            lines = _Lines(file, offset)
            for record in self._records(lines):
                yield offset, record
                offset = lines.offset

    def _parse(self, raw: list[str] | str) -> TableRow:
        if isinstance(raw, str):
            return raw
        if len(raw) != len(self.columns):
            return f"the row has {len(raw)} cells, the header {len(self.columns)}"
        return dict(zip(self.columns, (cell or None for cell in raw), strict=True))


class JsonLinesFile(_TextFile[bytes]):
    """A file of one JSON object per line; the columns are the keys of the first objects."""

    def __init__(self, path: Path):
        super().__init__(path, 0)
        self.columns = list(dict.fromkeys(name for row in self.head for name in row))

    def _scan(self, offset: int) -> Iterator[tuple[int, bytes]]:
        with open(self.path, "rb") as file:
            lines = _Lines(file, offset)
            for line in lines:
                if not line.isspace():
                    yield offset, line
                offset = lines.offset

    def _parse(self, raw: bytes) -> TableRow:
        try:
            return read_json(raw.removeprefix(BOM))
        except ValueError as error:
            return f"the line {error}"


def _csv_problem(message: str) -> str:
    """Translate a message of Python's csv module."""
    if "field limit" in message:
        return "a cell has more than 1 MB, or its quotation mark is never closed"
    if "unexpected end" in message:
        return "the file ends inside quotation marks"
    return f"the row cannot be read: {message}"
