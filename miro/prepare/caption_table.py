"""Captions that others wrote: a Parquet, CSV, TSV or JSONL file of keys, kinds and captions."""

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
    """A table of captions, held in memory: `kinds` in the order they first come.

    Raises:
        ValueError: the file cannot be read, lacks a column, names a kind that cannot be one or a
            sample's caption twice.
    """

    reads_images = False
    silence = "the table has none"

    def __init__(self, path: Path) -> None:
        self._path = path
        table = _read(path)
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(
                f"{path}: no column {missing[0]!r} among {', '.join(table.column_names)}; a table "
                f"of captions has {', '.join(COLUMNS)}"
            )
        keys, kinds = (table[name].to_pylist() for name in ("key", "kind"))
        self._captions = table["caption"]
        self.kinds: tuple[str, ...] = tuple(dict.fromkeys(kinds))
        for kind in self.kinds:
            if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", kind):
                raise ValueError(
                    f"{path}: {kind!r} is no kind of caption; letters, digits, - and _ make one"
                )
        self._rows: dict[tuple[str, str], int] = {}
        for row, pair in enumerate(zip(keys, kinds, strict=True)):
            if self._rows.setdefault(pair, row) != row:
                raise ValueError(
                    f"{path}: two rows have key {pair[0]!r} and kind {pair[1]!r}, the "
                    f"{self._rows[pair] + 1}th and the {row + 1}th; keep one"
                )

    def check(self, keys: Iterable[str]) -> None:
        """ValueError where a row is of a sample that is not among the keys."""
        known = set(keys)
        strange = [key for key, _ in self._rows if key not in known]
        if strange:
            raise ValueError(
                f"{self._path}: {len(strange):,} of its {len(self._rows):,} rows are of samples "
                f"that are not in the dataset, first: {strange[0]!r}; the keys are those of the "
                "dataset's score tables"
            )

    def captions(
        self, items: Sequence[RawSample], images: Sequence[Tensor | None]
    ) -> list[dict[str, Any]]:
        """For each sample {kind: caption}; the images are not looked at."""
        return [
            {
                kind: self._captions[self._rows[item.key, kind]].as_py()
                for kind in self.kinds
                if (item.key, kind) in self._rows
            }
            for item in items
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
