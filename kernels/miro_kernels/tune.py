"""Search for the fastest tiles on a device, once for all runs that are to share them.

    python -m miro_kernels.tune tiles.json --batch 64 --tokens 256
    MIRO_TILES=tiles.json miro train ...

Each setting of each kernel of a block is halved and doubled for as long as the block gets faster.
Runs never tune: all their ranks read one file, and so sum in the same order.
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
from miro_kernels._triton import target, triton
from miro_kernels.prewarm import prewarm
from miro_kernels.tiles import Tile

LEAST_GAIN = 0.01
"""Relative gain below which a tile is not taken: noise."""


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of `run` on the device; infinity if a tile does not fit it."""
    try:
        median: Any = triton.testing.do_bench(run, return_mode="median")
    except (triton.OutOfResources, triton.CompilationError):
        return float("inf")
    return median


def tune(
    run: Callable[[], object], time: Callable[[Callable[[], object]], float] = milliseconds
) -> dict[str, Tile]:
    """Return the tiles, by kernel, with which `run` takes the least time.

    Args:
        run: launches kernels at the shapes of interest.
        time: measures a run, in any unit.
    """
    family = target().family
    best: dict[str, Tile] = dict(tiles.used_by(run))
    with tiles.override_tiles({family: best}):
        least = time(run)
        for kernel in best:
            for candidate in _neighbours(best, kernel):
                before, best[kernel] = best[kernel], candidate
                if (elapsed := time(run)) < least * (1 - LEAST_GAIN):
                    least = elapsed
                else:
                    best[kernel] = before
    return best


def _neighbours(best: dict[str, Tile], kernel: str) -> Iterator[Tile]:
    """Tiles that differ from the kernel's best so far by a factor of two in one setting."""
    for name in best[kernel]:
        for double in (False, True):
            while True:
                current = best[kernel]
                value = current[name] * 2 if double else current[name] // 2
                if value == 0:
                    break
                candidate = {**current, name: value}
                yield candidate
                if best[kernel] != candidate:
                    break


class _Model(NamedTuple):
    channels: int
    heads: int
    hidden: int


def main() -> None:
    """Tune the kernels of one model's block and write their tiles as JSON."""
    parser = argparse.ArgumentParser("python -m miro_kernels.tune", description=__doc__)
    parser.add_argument("file", type=Path, help="JSON file to write the tiles to")
    preset = {"channels": 1024, "heads": 16, "hidden": 3072, "batch": 64, "tokens": 256}
    for name, value in (preset | {"rewards": 7, "levels": 64}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    options = vars(parser.parse_args())
    file, dtype = options.pop("file"), getattr(torch, options.pop("dtype"))
    model = _Model(*(options.pop(name) for name in _Model._fields))
    found = tune(partial(prewarm, model, **options, dtype=dtype, device="cuda"))
    file.write_text(json.dumps({target().family: found}, indent=2))


if __name__ == "__main__":
    main()
