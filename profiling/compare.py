"""Compare two results and report regressions.

    python profiling/compare.py BEFORE.json AFTER.json

Quantities in both files are compared. A number under `counted` (bytes, launches, FLOPs, parameters,
synchronisations) is exact: an increase is a regression. A timed quantity has median, p20 and p80:
it is slower or faster if the two ranges from p20 to p80 do not overlap. Rates and ratios are better
when larger, everything else when smaller. Exits 1 on a regression, 2 if the files have no quantity
in common.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_utils import argument_parser

LARGER_IS_BETTER = ("images_per_second", "ratio", "mfu", "share")
TIMED = {"median", "p20", "p80"}


@dataclass(frozen=True)
class Change:
    """A quantity in both files; verdict: grew, shrank, slower, faster or same."""

    name: str
    before: float
    after: float
    verdict: str

    @property
    def regression(self) -> bool:
        """Whether it is worse."""
        return self.verdict in ("grew", "slower")

    def __str__(self) -> str:
        over = f"{self.after / self.before:.3f}" if self.before else "new"
        return f"{self.verdict:8}{self.before:14.6g} {self.after:14.6g}  × {over:8}{self.name}"


def quantities(record: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every counted number and every timed record with its path."""
    if isinstance(record, list):
        record = {str(index): value for index, value in enumerate(record)}
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
    """Compare two counted numbers or timed records."""
    name = " ".join(path)
    if not isinstance(before, dict):
        verdict = "grew" if after > before else "shrank" if after < before else "same"
        return Change(name, before, after, verdict)
    larger_is_better = any(word in part for word in LARGER_IS_BETTER for part in path)
    verdict = "same"
    if after["p20"] > before["p80"]:
        verdict = "faster" if larger_is_better else "slower"
    elif after["p80"] < before["p20"]:
        verdict = "slower" if larger_is_better else "faster"
    return Change(name, before["median"], after["median"], verdict)


def compare(before: Any, after: Any) -> list[Change]:
    """Compare every quantity that both records have.

    Raises:
        ValueError: there is none, or one is counted in one record and timed in the other.
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
    """Print what differs between two results."""
    parser = argument_parser(__doc__, out=None)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    records = [json.loads(path.read_text()) for path in (args.before, args.after)]
    for name in ("device", "torch", "settings"):
        first, second = (record.get(name) for record in records)
        if first != second:
            print(f"warning: {name} differs: {first} and {second}")
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
