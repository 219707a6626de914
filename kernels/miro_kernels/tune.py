"""Finding tiles on a device, for all runs that are to share them.

    python -m miro_kernels.tune tiles.json --batch 64 --tokens 256
    MIRO_TILES=tiles.json miro train ...

Every setting of every kernel a block launches is halved and doubled for as long as the block gets
faster. Nothing of this happens during a run: all its ranks read one file, and sum in one order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from miro_kernels import tiles
from miro_kernels._triton import target
from miro_kernels.prewarm import prewarm
from miro_kernels.tiles import Tile

LEAST_GAIN = 0.01
"""Share of the time that a tile must save to be taken up: less is noise."""


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of `run` on the device; infinite where a tile asks too much of it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        median: Any = do_bench(run, return_mode="median")
    except (OutOfResources, CompilationError):
        return float("inf")
    return median


def tune(
    run: Callable[[], object], time: Callable[[Callable[[], object]], float] = milliseconds
) -> dict[str, Tile]:
    """The tiles by kernel, of those that `run` launches, with which it takes the least time.

    Args:
        run: launches kernels at the shapes of interest.
        time: gives the time of a run.
    """
    family = target().family
    best: dict[str, Tile] = dict(tiles.used_by(run))
    with tiles.replaced({family: best}):
        least = time(run)
        for kernel in best:
            for candidate in _neighbours(best, kernel):
                before, best[kernel] = best[kernel], candidate
                if (taken := time(run)) < least * (1 - LEAST_GAIN):
                    least = taken
                else:
                    best[kernel] = before
    return best


def _neighbours(best: dict[str, Tile], kernel: str) -> Iterator[Tile]:
    """Tiles that differ from the kernel's best so far by a factor of two in one setting."""
    for name in best[kernel]:
        for double in (False, True):
            while True:
                now = best[kernel]
                value = now[name] * 2 if double else now[name] // 2
                if value == 0:
                    break
                candidate = {**now, name: value}
                yield candidate
                if best[kernel] != candidate:
                    break


class _Shape(NamedTuple):
    channels: int
    heads: int
    hidden: int


def main() -> None:
    parser = argparse.ArgumentParser("python -m miro_kernels.tune", description=__doc__)
    parser.add_argument("file", type=Path, help="where the tiles go, as JSON")
    preset = {"channels": 1024, "heads": 16, "hidden": 3072, "batch": 64, "tokens": 256}
    for name, value in (preset | {"rewards": 7, "levels": 64}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    given = vars(parser.parse_args())
    file, dtype = given.pop("file"), getattr(torch, given.pop("dtype"))
    shape = _Shape(*(given.pop(name) for name in _Shape._fields))
    found = tune(partial(prewarm, shape, **given, dtype=dtype, device="cuda"))
    file.write_text(json.dumps({target().family: found}, indent=2))


if __name__ == "__main__":
    main()
