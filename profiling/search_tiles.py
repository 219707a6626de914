"""Times many tiles of the norms' and of attention's kernels on this machine's GPU.

    python profiling/search_tiles.py [KERNEL ...] [--out profiling/results] [--top 8]

For each kernel a grid of settings, at the shapes of the 0.36 B preset, timed as gpu_check.py times:
the table's own tile and the fastest are printed, all are written as JSON. Every setting is first
compiled, on all cores. What is found is written into `miro_kernels/tiles.py` by hand, once the
compiled lane has shown that it neither spills nor narrows an access on the other targets.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_check import BATCH, CASES, DEVICE, DTYPE, Clock, Run, Variant, by_backend, directions_of
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from miro_kernels import tiles
from miro_kernels._triton import target
from miro_kernels.lab.case_metrics import leaves_of
from miro_kernels.lab.cases import Make

ROOT = Path(__file__).parent.parent
Settings = dict[str, int]


@dataclass(frozen=True)
class Search:
    """A kernel, the case and direction that launch it, and the values tried of each setting."""

    kernel: str
    op: str
    direction: str
    values: dict[str, tuple[int, ...]]

    def grid(self) -> Iterator[Settings]:
        """The settings to try: the table's own first, none that leaves a warp without rows."""
        own = dict(tiles.tile(self.kernel))
        yield own
        for values in product(*self.values.values()):
            found = own | dict(zip(self.values, values, strict=True))
            rows = min(found.get("queries", 64), found.get("keys", 64))
            if found != own and (rows >= 32 and found["warps"] <= found.get("queries", 256) // 8):
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
    """What launches the kernel at the case's shapes."""
    case = next(case for case in CASES if case.op == search.op)
    given = case.arguments(Make(DEVICE, DTYPE), batch)
    variant = Variant("kernels", by_backend("triton", case.prepare(given)), leaves_of(given))
    return directions_of(case, variant)[search.direction]


def with_tile(kernel: str, settings: Settings, run: Run) -> Run:
    def chosen() -> Any:
        with tiles.override_tiles({target().family: {kernel: settings}}):
            return run()

    return chosen


def compile_share(work: tuple[int, int, tuple[Search, ...]]) -> None:
    """Compile every `workers`th setting: Triton keeps the code on disk, for the timing process."""
    share, workers, searches = work
    every = [(search, settings) for search in searches for settings in search.grid()]
    runs: dict[str, Run] = {}
    for search, settings in every[share::workers]:
        # What code is generated depends on the shapes' divisibility, not on how many samples.
        run = runs.get(search.kernel) or runs.setdefault(search.kernel, prepare(search, 16))
        try:
            with_tile(search.kernel, settings, run)()
        except (OutOfResources, CompilationError):
            continue


def measure(search: Search, clock: Clock) -> list[dict[str, Any]]:
    """A row for each setting that runs, in the grid's order."""
    run, rows = prepare(search, BATCH), []
    for settings in search.grid():
        try:
            times = clock(with_tile(search.kernel, settings, run))
        except (OutOfResources, CompilationError):
            continue
        rows.append({"kernel": search.kernel, "settings": settings, **times})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [search.kernel for search in SEARCHES]
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "results")
    parser.add_argument("--top", type=int, default=8)
    options = parser.parse_args()
    if unknown := set(options.kernels) - set(names):
        parser.error(f"no kernel {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not torch.cuda.is_available():
        print("search_tiles: this machine has no GPU that torch can use; nothing was timed.")
        return 2
    searches = tuple(s for s in SEARCHES if not options.kernels or s.kernel in options.kernels)
    workers = min(12, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_share, [(n, workers, searches) for n in range(workers)], chunksize=1)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"tiles-{record['device'].replace(' ', '-')}-{record['date']}"
    clock = Clock(repeats=15)
    for search in searches:
        rows = measure(search, clock)
        record["rows"] += rows
        (options.out / f"{stem}.json").write_text(json.dumps(record) + "\n")
        print(f"{search.kernel} in {search.op}, {search.direction}, microseconds:")
        best = sorted(rows[1:], key=lambda row: row["median"])[: options.top]
        for row in rows[:1] + best:
            print(f"  {row['median'] * 1e3:7.1f}  {row['settings']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
