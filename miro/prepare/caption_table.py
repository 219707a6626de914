"""Captions from a table: a Parquet, CSV, TSV or JSONL file of keys, caption types and captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from torch import Tensor

from miro.sources.sample import RawSample

COLUMNS = ("key", "kind", "caption")


class CaptionTable:
    """A captioner (see `miro.prepare.caption`) that looks captions up in a table in memory.

    Args:
        path: The file, with the columns key, kind (the caption type) and caption.

    Attributes:
        types: Caption types in the order of their first rows.

    Raises:
        ValueError: The file is unreadable, lacks a column, or has an invalid caption type or two
            captions of one type for a sample.
    """

    reads_images = False
    missing_reason = "the table has none"

    def __init__(self, path: Path) -> None:
        self._path = path
        table = _read(path)
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(
                f"{path}: no column {missing[0]!r} among {', '.join(table.column_names)}; a table "
                f"of captions has {', '.join(COLUMNS)}"
            )
        keys, types = (table[name].to_pylist() for name in ("key", "kind"))
        self._captions = table["caption"]
        self.types: tuple[str, ...] = tuple(dict.fromkeys(types))
        for name in self.types:
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"{path}: {name!r} is not a caption type; use letters, digits, - and _"
                )
        self._rows: dict[tuple[str, str], int] = {}
        for row, (key, name) in enumerate(zip(keys, types, strict=True)):
            if (first := self._rows.setdefault((key, name), row)) != row:
                raise ValueError(
                    f"{path}: rows {first + 1} and {row + 1} both have key {key!r} and kind "
                    f"{name!r}; remove one"
                )

    def check(self, keys: Iterable[str]) -> None:
        """Raise ValueError if a row's key is not among `keys`."""
        known = set(keys)
        unknown = [key for key, _ in self._rows if key not in known]
        if unknown:
            raise ValueError(
                f"{self._path}: {len(unknown):,} of its {len(self._rows):,} rows are of samples "
                f"that are not in the dataset, first: {unknown[0]!r}; the keys are those of the "
                "dataset's score tables"
            )

    def captions(
        self, samples: Sequence[RawSample], images: Sequence[Tensor | None]
    ) -> list[dict[str, Any]]:
        """Look up {caption type: caption} of each sample; `images` are unused."""
        return [
            {
                name: self._captions[self._rows[sample.key, name]].as_py()
                for name in self.types
                if (sample.key, name) in self._rows
            }
            for sample in samples
        ]


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.ParquetFile(path).read()
        if path.suffix in (".csv", ".tsv"):
            parse = pyarrow.csv.ParseOptions(
                delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
            )
            convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()))
            return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
        if path.suffix in (".jsonl", ".json"):
            return pyarrow.json.read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from error
    raise ValueError(f"{path}: a table of captions ends in .parquet, .csv, .tsv or .jsonl")
