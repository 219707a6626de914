"""Tables with an image column and caption columns, in one file or several.

An image is a path relative to the table's folder, or its bytes as in Hugging Face datasets. Paths
are not restricted to that folder, since tables on clusters often use absolute paths.
"""

from __future__ import annotations

import json
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from miro.images.pillow import IMAGE_EXTENSIONS
from miro.sources.arrow import ArrowStream, ParquetFile
from miro.sources.csv_jsonl import DelimitedFile, JsonLinesFile, TableRow
from miro.sources.sample import (
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    RawSample,
    RejectedSample,
    Samples,
    caption_type,
    captions_of,
    check_captions,
    fingerprint,
    is_caption,
    is_prose,
    read_file,
    unique_keys,
)
from miro.utils.serialize import unknown_name

log = logging.getLogger(__name__)

RowFile = DelimitedFile | JsonLinesFile | ParquetFile | ArrowStream
TABLES = {
    ".csv": DelimitedFile,
    ".tsv": DelimitedFile,
    ".jsonl": JsonLinesFile,
    ".parquet": ParquetFile,
    ".arrow": ArrowStream,
}

IMAGE_COLUMNS = (
    "image", "image_path", "path", "file", "filename", "file_name", "image_file", "filepath",
)  # fmt: skip
CAPTION_COLUMNS = ("original_caption", "caption", "text", "prompt", "captions")


@dataclass(frozen=True)
class TableColumns:
    """Image and caption columns of a table; those not given are found by name."""

    image: str | None = None
    captions: tuple[str, ...] = ()


class TableSource:
    """The rows of files of one format, one file after another; a group is a slice of the rows.

    A sample's key is its row number, counted from 0 over all files. Opening Parquet and Arrow files
    reads their metadata only; text files are scanned once.
    """

    def __init__(self, paths: Sequence[Path], samples_per_shard: int, columns: TableColumns):
        files: list[RowFile] = [TABLES[path.suffix.lower()](path) for path in paths]
        self._files = [file for file in files if file.rows]
        if not self._files:
            raise ValueError(f"{paths[0]}: the table has no rows")
        self._layout = _Layout.find(self._files, columns)
        self._starts = list(accumulate((file.rows for file in self._files), initial=0))
        self._size = samples_per_shard
        rows = self._starts[-1]
        self.total: int | None = rows
        self.groups = -(-rows // samples_per_shard)
        parts = [f"{file.path.name} {file.path.stat().st_size} {file.rows}" for file in self._files]
        parts = ["table in groups", str(samples_per_shard), str(self._layout), *parts]
        self.fingerprint = fingerprint(parts)
        log.info("%s: %s rows, %s", paths[0], f"{rows:,}", self._layout)

    def partitions(self, group: int, skip: int = 0) -> Iterator[Samples]:
        """Yield the only partition of a group, a slice of the rows."""
        if skip == 0:
            first = group * self._size
            yield self._read(first, min(first + self._size, self._starts[-1]))

    def _read(self, first: int, stop: int) -> Samples:
        for index in range(bisect_right(self._starts, first) - 1, len(self._files)):
            file, before = self._files[index], self._starts[index]
            if before >= stop:
                return
            start, end = max(first - before, 0), min(stop - before, file.rows)
            rows = file.read(start, end, self._layout.image)
            for number, row in enumerate(rows, before + start):
                yield from self._layout.read_row(file.path, f"{number:08d}", row)


@dataclass(frozen=True)
class _Layout:
    """The image column, and the caption type of each caption column."""

    image: str
    captions: dict[str, str]

    def __str__(self) -> str:
        captions = ", ".join(f"{name} from {column!r}" for column, name in self.captions.items())
        return f"images from {self.image!r}, captions: {captions}"

    @classmethod
    def find(cls, files: Sequence[RowFile], columns: TableColumns) -> _Layout:
        """Find the columns that were not given, by name; raises ValueError if there are none.

        A caption column must contain prose, which "caption_length" does not.
        """
        path, known = files[0].path, files[0].columns
        has = f"it has the columns {', '.join(known)}"
        if len(set(known)) < len(known):
            raise ValueError(f"{path}: two columns have one name, {has}")
        for name in filter(None, (columns.image, *columns.captions)):
            if name not in known:
                raise ValueError(f"{path}: {unknown_name('column', name, known)}")
        image = columns.image or _first_match(IMAGE_COLUMNS, known)
        if image is None:
            raise ValueError(f"{path}: no column of images, {has}; name it by --image-column")
        captions = list(columns.captions)
        if not captions:
            head = next((head for file in files if (head := file.head)), [])
            captions = [c for c in _caption_columns(known) if any(is_prose(r.get(c)) for r in head)]
        captions = [name for name in captions if name != image]
        if not captions:
            raise ValueError(f"{path}: no captions, {has}; name theirs by --caption-columns")
        for file in files:
            if missing := {image, *captions} - set(file.columns):
                raise ValueError(
                    f"{file.path}: no column {min(missing)!r}, which {path} has; annotate it alone"
                )
        return cls(image, _caption_types(captions))

    def read_row(self, table: Path, key: str, row: TableRow) -> Samples:
        """Yield the sample of a row, and what is rejected of it."""
        origin = f"{table.name}:{key}"
        if isinstance(row, str):
            yield RejectedSample(origin, "row", row)
            return
        image = _read_image(row.get(self.image), table.parent)
        if isinstance(image, str):
            yield RejectedSample(origin, "image", image)
            return
        found: dict[str, Any] = {}
        for column, name in self.captions.items():
            value = row.get(column)
            if isinstance(value, list | dict):
                found = {**captions_of(value, name), **found}
            elif value is not None:
                found[name] = value
        if_none = f"no caption in {' or '.join(self.captions)}"
        captions, problems = check_captions(origin, found, if_none)
        yield from problems
        if captions:
            used = {self.image, *self.captions}
            # Drop captions of other columns, or they would be read from the shard's JSON later.
            rest = {n: v for n, v in row.items() if n not in used and not is_caption(n, v)}
            extra = {name: value for name, value in rest.items() if _is_json(value)}
            yield RawSample(origin, key, *image, captions, extra)


def _first_match(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The column of the first of `names` that the table has, ignoring case."""
    folded = {name.casefold(): name for name in reversed(known)}
    return next((folded[name] for name in names if name in folded), None)


def _caption_columns(known: Sequence[str]) -> list[str]:
    """The columns with names of captions, the most likely original caption first."""
    common = [_first_match([name], known) for name in CAPTION_COLUMNS]
    return list(dict.fromkeys([*filter(None, common), *filter(caption_type, known)]))


def _caption_types(columns: Sequence[str]) -> dict[str, str]:
    """{column: caption type}, from the name, or "original" for the first without one in it."""
    types: dict[str, str] = {}
    for column in columns:
        short = caption_type(column) or "original"
        types[column] = column if short in types.values() else short
    return dict(zip(types, unique_keys(types.values()), strict=True))


def _read_image(value: Any, folder: Path) -> tuple[str, bytes] | str:
    """(extension, bytes) of the image in a cell, or why it cannot be read."""
    data, path = value, value
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
    if not isinstance(data, bytes):
        if path is None or path == "":
            return "the cell is empty"
        if not isinstance(path, str):
            return f"the cell must be a path or bytes, got {type(path).__name__}"
        data = _read_image_file(path, folder)
        if isinstance(data, str):
            return data
    if len(data) > MAX_IMAGE_BYTES:
        return f"is too large: {len(data):,} bytes, the limit is {MAX_IMAGE_BYTES:,}"
    extension = os.path.splitext(path)[1][1:].lower() if isinstance(path, str) else ""
    return extension if extension in IMAGE_EXTENSIONS else _extension(data), data


def _read_image_file(path: str, folder: Path) -> bytes | str:
    """The bytes of an image file named in a table, or why it cannot be read."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path):
        return f"{path[:200]!r} is a URL; download the images first"
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return f"{path[:200]!a} is not the name of a file"
    if "\0" in path:
        return f"{path[:200]!r} contains a zero byte"
    data = read_file(os.path.join(folder, path), MAX_IMAGE_BYTES)
    return f"{path[:200]!r} {data}" if isinstance(data, str) else data


def _extension(data: bytes) -> str:
    """The file extension of an image by its magic bytes, "jpg" if they are unknown."""
    magic = {
        b"\x89PNG": "png",
        b"RIFF": "webp",
        b"GIF8": "gif",
        b"BM": "bmp",
        b"II*\0": "tif",
        b"MM\0*": "tif",
    }
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((name for start, name in magic.items() if data.startswith(start)), "jpg")


def _is_json(value: Any) -> bool:
    """Whether a cell can be stored as JSON (NaN cannot), in at most MAX_CAPTION_BYTES."""
    if value is None:
        return False
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return len(text.encode()) <= MAX_CAPTION_BYTES
    except (TypeError, ValueError):
        return False
