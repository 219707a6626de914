"""The JSON files of results/, read and checked once, so that plots and page only lay them out.

The kind of a file is told by its content, not by its name. A file that no script of this folder
writes, or that lacks a field, is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from compare import TIMED, quantities
from result_kinds import COUNTED, KINDS, MAYBE, POSITIVE, Kind


class Spread(NamedTuple):
    """A median with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


Quantity = Spread | float


@dataclass(frozen=True)
class Result:
    """A file of results/."""

    path: Path
    kind: Kind
    record: dict[str, Any]

    @property
    def date(self) -> str:
        """Of the run, empty where the file does not say."""
        return self.record.get("date", "")

    @property
    def place(self) -> str:
        """What it ran on."""
        return self.record.get("device") or self.record.get("machine") or ""

    @property
    def made(self) -> str:
        """When, on what, and of which code."""
        commit = self.record.get("commit")
        said = (self.date or "no date in the file", self.place, commit and f"commit {commit}")
        return ", ".join(filter(None, said))

    @property
    def command(self) -> str:
        return self.record.get("command", self.kind.command)

    @property
    def series(self) -> str:
        """What must be equal for two files to be of one history."""
        # What is counted is the same on any machine.
        keys = ("seed",) if self.kind.name in COUNTED else ("device", "threads", "seed")
        about = [f"{key} {self.record[key]}" for key in keys if key in self.record]
        if self.kind.name != "demo":
            settings = self.record.get("settings", {})
            about += [f"{key} {_short(value)}" for key, value in settings.items()]
        return ", ".join([self.kind.name, *about])

    @property
    def quantities(self) -> dict[str, Quantity]:
        """Every counted and timed quantity, by a name that is the same in all files of its kind."""
        found: dict[str, Quantity] = {}
        for path, value in quantities(self.kind.flat(self.record)):
            name = ": ".join(part for part in path if part != "counted")
            found[name] = spread(value) if isinstance(value, dict) else float(value)
        return found


def _short(setting: Any) -> str:
    """A setting on a page: equal things in a list are said once."""
    if isinstance(setting, list) and len(set(map(str, setting))) == 1:
        return f"{len(setting)} × {setting[0]}"
    return str(setting)


def spread(row: dict[str, float]) -> Spread:
    """A timed row's median, p20 and p80."""
    return Spread(*(row[key] for key in Spread._fields))


def read(path: Path) -> Result:
    """One file of results.

    Raises:
        ValueError: it is not JSON, of no kind known here, or lacks what its kind has; names it.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    names = _names(record)
    kind = next((kind for kind in KINDS if kind.told_by <= names), None)
    if kind is None:
        raise ValueError(
            f"{path}: not a result that a script of profiling/ writes; move it away, or add its "
            "kind to result_files.py"
        )
    for wrong in _faults(record, kind.shape, ""):
        raise ValueError(f"{path}: {wrong}; make it again with `{kind.command}`")
    return Result(path, kind, record)


def read_folder(folder: Path) -> list[Result]:
    """All JSON files in `folder`, by date, those without one first.

    Raises:
        ValueError: a file is not understood, or the folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return by_date(found)


def by_date(results: Iterable[Result]) -> list[Result]:
    """The results in order; those of one day by their names, a longer one after what it begins."""
    return sorted(results, key=lambda result: (result.date, result.path.stem))


def latest(results: Sequence[Result], kind: str) -> Result | None:
    """The last of a kind; `results` as `read_folder` gives them."""
    assert any(known.name == kind for known in KINDS), kind
    return next((result for result in reversed(results) if result.kind.name == kind), None)


def histories(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results that can be compared with one another, by date."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.quantities:
            found.setdefault(result.series, []).append(result)
    return found


def _names(record: Any) -> set[str]:
    """The fields of a record, of its first row and of its first variant."""
    if not isinstance(record, dict):
        return set()
    rows, variants = record.get("rows"), record.get("variants")
    first = rows[:1] if isinstance(rows, list) else []
    first += list(variants.values())[:1] if isinstance(variants, dict) else []
    return set(record).union(*(row for row in first if isinstance(row, dict)))


def _faults(value: Any, shape: Any, where: str) -> Iterator[str]:
    """What of a value is not as its shape says."""
    if isinstance(shape, str):
        if shape == MAYBE and value is None:
            return
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not math.isfinite(value) or (shape == POSITIVE and value <= 0):
            yield f"{where} is {value!r}, not {shape}"
    elif isinstance(shape, type):
        if not isinstance(value, shape):
            yield f"{where} is {value!r}, not of type {shape.__name__}"
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{where} is not a list with something in it"
        else:
            for number, item in enumerate(value):
                yield from _faults(item, shape[0], f"{where}.{number}")
    elif not isinstance(value, dict):
        yield f"{where or 'the file'} is {value!r}, not an object"
    elif ... in shape:
        for name, item in value.items():
            yield from _faults(item, shape[...], f"{where}.{name}")
    else:
        for name, inside in shape.items():
            if name in value:
                yield from _faults(value[name], inside, f"{where}.{name}".lstrip("."))
            else:
                yield f"{where}.{name}".lstrip(".") + " is missing"


assert TIMED == set(Spread._fields)
