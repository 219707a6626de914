"""What got faster or slower between two results of this folder.

    python profiling/compare.py BEFORE.json AFTER.json

Numbers are compared where both files have them. A number under `counted` (bytes, launches, FLOPs,
parameters, synchronisations) is exact: one that grew is a regression. A timed one is a record of
median, p20 and p80: it is slower, or faster, where the two ranges do not touch. Rates and ratios
are better when larger, everything else when smaller. Exits 1 on a regression, 2 where the files
have nothing in common.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGER_IS_BETTER = ("images_per_second", "ratio", "together_to_apart", "mfu", "share")
TIMED = {"median", "p20", "p80"}


@dataclass(frozen=True)
class Change:
    """One quantity in both files."""

    name: str
    before: float
    after: float
    verdict: str
    """grew, shrank, slower, faster, or the same."""

    @property
    def regression(self) -> bool:
        return self.verdict in ("grew", "slower")

    def __str__(self) -> str:
        over = f"{self.after / self.before:.3f}" if self.before else "new"
        return f"{self.verdict:8}{self.before:14.6g} {self.after:14.6g}  × {over:8}{self.name}"


def quantities(record: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every counted number and every timed record, by its path."""
    if isinstance(record, list):
        record = {str(number): value for number, value in enumerate(record)}
    if not isinstance(record, dict):
        return
    if record.keys() >= TIMED:
        yield path, record
        return
    for name, value in record.items():
        inside = (*path, name)
        if "counted" in path and isinstance(value, int | float):
            yield inside, value
        else:
            yield from quantities(value, inside)


def judge(path: tuple[str, ...], before: Any, after: Any) -> Change:
    name = " ".join(path)
    if not isinstance(before, dict):
        verdict = "grew" if after > before else "shrank" if after < before else "same"
        return Change(name, before, after, verdict)
    up = any(word in part for word in LARGER_IS_BETTER for part in path)
    verdict = "same"
    if after["p20"] > before["p80"]:
        verdict = "faster" if up else "slower"
    elif after["p80"] < before["p20"]:
        verdict = "slower" if up else "faster"
    return Change(name, before["median"], after["median"], verdict)


def compare(before: Any, after: Any) -> list[Change]:
    """Every quantity that both records have.

    Raises:
        ValueError: they have none in common, or a quantity is counted in one and timed in the
            other.
    """
    old, new = dict(quantities(before)), dict(quantities(after))
    shared = [path for path in old if path in new]
    if not shared:
        raise ValueError("the two files have no counted or timed quantity in common")
    for path in shared:
        if isinstance(old[path], dict) != isinstance(new[path], dict):
            raise ValueError(f"{' '.join(path)} is timed in one file and counted in the other")
    return [judge(path, old[path], new[path]) for path in shared]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    given = parser.parse_args()
    records = [json.loads(path.read_text()) for path in (given.before, given.after)]
    for name in ("device", "torch", "settings"):
        first, second = (record.get(name) for record in records)
        if first != second:
            print(f"careful: {name} differs: {first} and {second}")
    try:
        changes = compare(*records)
    except ValueError as error:
        print(f"compare: {error}")
        return 2
    for change in changes:
        print(change)
    worse = [change for change in changes if change.regression]
    print(f"{len(changes)} quantities, {len(worse)} worse")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
