"""Time tile configurations of the norm and attention kernels on a GPU.

    python profiling/search_tiles.py [KERNEL ...] [--out profiling/results] [--top 8]

Times a grid of settings per kernel at the shapes of the 0.36 B preset, as gpu_check.py does, after
compiling all of them on all cores. Prints the current tile and the fastest ones and writes all as
JSON. Copy a better tile into `miro_kernels/tiles.py` by hand, after tests/kernels/compiled shows no
spills and no narrow accesses on the other targets.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from typing import Any

import torch
from bench_utils import argument_parser, metadata, write_json
from gpu_check import (
    BATCH,
    CASES,
    DEVICE,
    DTYPE,
    Clock,
    Run,
    Variant,
    directions_of,
    with_backend,
)
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from miro_kernels import tiles
from miro_kernels._triton import target
from miro_kernels.lab.case_metrics import leaves_of
from miro_kernels.lab.cases import Make

Settings = dict[str, int]


@dataclass(frozen=True)
class Search:
    """A kernel, the case and direction that launch it, and the values of each setting to try."""

    kernel: str
    op: str
    direction: str
    values: dict[str, tuple[int, ...]]

    def grid(self) -> Iterator[Settings]:
        """The settings to try, the current tile first; every warp has rows."""
        current = dict(tiles.tile(self.kernel))
        yield current
        for values in product(*self.values.values()):
            found = current | dict(zip(self.values, values, strict=True))
            rows = min(found.get("queries", 64), found.get("keys", 64))
            if found != current and (
                rows >= 32 and found["warps"] <= found.get("queries", 256) // 8
            ):
                yield found


NORM = {"rows": (1, 2, 4, 8), "warps": (2, 4), "stages": (1, 2, 3)}
HEAD = {"warps": (4, 8), "stages": (1, 2, 3)}
SEARCHES = (
    Search("norm_forward", "reward_adaln gated", "forward", NORM | {"tokens": (8, 16, 32, 64)}),
    Search("norm_backward", "reward_adaln gated", "backward", NORM | {"tokens": (32, 64, 128)}),
    Search(
        "attention_forward_64", "attention", "forward",
        {"queries": (64, 128, 256), "keys": (64, 128), "text": (32, 64), "warps": (4, 8, 16)}
        | {"stages": (2, 3)},
    ),
    Search(
        "attention_queries_64", "attention", "backward",
        HEAD | {"queries": (64, 128), "keys": (32, 64, 128)},
    ),
    Search(
        "attention_keys_64", "attention", "backward",
        HEAD | {"keys": (64, 128), "queries": (32, 64, 128)},
    ),
)  # fmt: skip


def prepare(search: Search, batch: int) -> Run:
    """A call that launches the kernel at the shapes of its case."""
    case = next(case for case in CASES if case.op == search.op)
    inputs = case.arguments(Make(DEVICE, DTYPE), batch)
    variant = Variant("kernels", with_backend("triton", case.prepare(inputs)), leaves_of(inputs))
    return directions_of(case, variant)[search.direction]


def with_tile(kernel: str, settings: Settings, run: Run) -> Run:
    """The call with another tile."""

    def wrapped() -> Any:
        with tiles.override_tiles({target().family: {kernel: settings}}):
            return run()

    return wrapped


def compile_share(work: tuple[int, int, tuple[Search, ...]]) -> None:
    """Compile every `workers`th setting into Triton's disk cache, for the timing process."""
    share, workers, searches = work
    every = [(search, settings) for search in searches for settings in search.grid()]
    runs: dict[str, Run] = {}
    for search, settings in every[share::workers]:
        # The generated code depends on the divisibility of the shapes, not on the batch.
        run = runs.get(search.kernel) or runs.setdefault(search.kernel, prepare(search, 16))
        try:
            with_tile(search.kernel, settings, run)()
        except (OutOfResources, CompilationError):
            continue


def measure(search: Search, clock: Clock) -> list[dict[str, Any]]:
    """Time each setting that runs, in the order of the grid."""
    run, rows = prepare(search, BATCH), []
    for settings in search.grid():
        try:
            times = clock(with_tile(search.kernel, settings, run))
        except (OutOfResources, CompilationError):
            continue
        rows.append({"kernel": search.kernel, "settings": settings, **times})
    return rows


def main() -> int:
    """Search tile sizes, and write the result."""
    parser = argument_parser(__doc__)
    names = [search.kernel for search in SEARCHES]
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL", help=f"default: all of {', '.join(names)}"
    )
    parser.add_argument("--top", type=int, default=8)
    args = parser.parse_args()
    if unknown := set(args.kernels) - set(names):
        parser.error(f"no kernel {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    if not torch.cuda.is_available():
        print("search_tiles: this machine has no GPU that torch can use; nothing was timed.")
        return 2
    searches = tuple(s for s in SEARCHES if not args.kernels or s.kernel in args.kernels)
    workers = min(12, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_share, [(n, workers, searches) for n in range(workers)], chunksize=1)
    record: dict[str, Any] = {**metadata(DEVICE), "triton": version("triton"), "rows": []}
    stem = f"tiles-{record['device'].replace(' ', '-')}-{record['date']}"
    clock = Clock(repeats=15)
    for search in searches:
        rows = measure(search, clock)
        record["rows"] += rows
        write_json(record, args.out / f"{stem}.json")
        print(f"{search.kernel} in {search.op}, {search.direction}, microseconds:")
        best = sorted(rows[1:], key=lambda row: row["median"])[: args.top]
        for row in rows[:1] + best:
            print(f"  {row['median'] * 1e3:7.1f}  {row['settings']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
