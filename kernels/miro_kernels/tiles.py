"""Tile sizes of every kernel per device family, with the reason for each.

A tile decides the order of sums, so all ranks of a run must use the same one: tiles depend on the
family and on shapes only, and nothing is timed during a run. `MIRO_TILES` may name a JSON file,
{family: {kernel: {setting: number}}}, whose entries replace the table's; all ranks must read the
same file. `python -m miro_kernels.tune` writes such a file on a machine with a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from miro_kernels import _triton

Tile = Mapping[str, int]

VARIABLE = "MIRO_TILES"
COUNTS = ("programs", "samples", "stages")
"""Settings that may be any number above 0; the others are tile sizes, powers of 2."""

# Norms. A loop step takes `rows` tokens of up to 256 channels per warp, 16 bytes of each token per
# thread in bf16, so that a sum over channels crosses few warps and a sum over tokens none; wider
# tokens take more warps, then fewer rows. A program loops over `tokens` of one sample, which share
# the modulation it sums in registers and, in backward, the partial sums it stores: at 64 tokens
# these are 4 % of the bytes, and the 0.36 B preset's batch still gives two programs per SM. Forward
# takes fewer tokens if there would be less than `programs` programs; backward does not, because
# there `tokens` decides the order of sums, which must not depend on the batch size. With so few
# programs the next step's loads must overlap a step's arithmetic: two stages.
NORM_FORWARD = {"rows": 4, "tokens": 64, "programs": 256, "warps": 8, "stages": 2}
NORM_BACKWARD = {"rows": 4, "tokens": 64, "programs": 1, "warps": 8, "stages": 2}

# Queries and keys. A loop step takes `elements` of each half of the heads, 16 bytes per thread. A
# program loops over the same positions of up to `samples` samples, to load their angles once, if
# that leaves `programs` programs. At the preset all of these are resident at once: four per SM in
# forward, and two in backward, whose sums take more registers.
QK_FORWARD = {"elements": 1024, "samples": 16, "programs": 512, "warps": 4, "stages": 2}
QK_BACKWARD = {"elements": 1024, "samples": 32, "programs": 256, "warps": 4, "stages": 2}

# Elementwise kernels: enough independent 16-byte accesses per thread to hide their latency, few
# enough registers for full occupancy.
SWIGLU = {"elements": 2048, "columns": 1024, "warps": 4}
ADAMW = {"elements": 1024, "chunk": 8192, "warps": 4}

# On an H100 a third stage saves 8 % in forward; in backward no tile saves more than 2 %, and those
# that do move more bytes (profiling/search_tiles.py).
_NORMS_SM_90: dict[str, Tile] = {"norm_forward": {**NORM_FORWARD, "stages": 3}}

_MEMORY_BOUND: dict[str, Tile] = {
    "norm_forward": NORM_FORWARD,
    "norm_backward": NORM_BACKWARD,
    "qk_forward": QK_FORWARD,
    "qk_backward": QK_BACKWARD,
    "swiglu_forward": SWIGLU,
    "swiglu_backward": SWIGLU,
    "adamw_ema": ADAMW,
}


def _attention(**rows: tuple[int, int, int, int, int]) -> dict[str, Tile]:
    names = ("queries", "keys", "text", "warps", "stages")
    return {
        f"attention_{kernel}": dict(zip(names, row, strict=True)) for kernel, row in rows.items()
    }


# Attention, by kernel and head size. `queries` and `keys` are the rows of a tile, `text` those of a
# tile of text keys: short, because the padding of a text's last tile is computed in vain. With 128
# rows resident, a program loads the other operand 128 times less often than with one; eight warps
# leave at most 128 registers per thread for two programs per SM where the head size allows, and
# never spill. The matrix units of sm_90 and sm_100 take at least 64 rows, so the kernel of dk and
# dv uses 64 in a tile of text too. Head size 96 leaves 32 channels after its first 64, which 32
# rows would spread over eight warps in less than 16 bytes per thread: 64 rows.
_ATTENTION = _attention(
    forward_32=(128, 64, 32, 8, 2),
    forward_64=(128, 64, 32, 8, 2),
    forward_96=(128, 64, 64, 8, 2),
    forward_128=(128, 64, 32, 8, 2),
    queries_32=(128, 64, 32, 8, 2),
    queries_64=(128, 64, 32, 8, 2),
    queries_96=(128, 64, 64, 8, 2),
    queries_128=(128, 64, 32, 8, 2),
    keys_32=(64, 128, 64, 8, 2),
    keys_64=(64, 128, 64, 8, 2),
    keys_96=(64, 128, 64, 8, 2),
    keys_128=(64, 64, 64, 8, 2),
    # fp32 products run without tensor cores, in unrolled code that grows with the tile. A thread
    # has a whole row of q and of do in registers, so dq of head size 128 spills with any tile.
    **{
        f"{d}_{n}_fp32": (32, 32, 32, 8, 1)
        for d in ("forward", "queries", "keys")
        for n in (32, 64, 96, 128)
    },
)
# On sm_80 accumulators and operands are all in registers: wide heads need smaller tiles.
_ATTENTION_SM_80 = _ATTENTION | _attention(
    queries_128=(128, 32, 32, 8, 2), keys_96=(32, 64, 32, 4, 2)
)

# Found on an H100 at the 0.36 B preset (profiling/search_tiles.py): four warps, which need no
# barrier with a second group, and three stages; many small programs hide each other's softmax. More
# programs load each key, at no cost: the L2 cache has it.
_ATTENTION_SM_90 = _ATTENTION | _attention(
    forward_64=(128, 64, 64, 4, 3), queries_64=(64, 32, 32, 4, 3), keys_64=(32, 64, 64, 4, 3)
)

TILES: dict[str, dict[str, Tile]] = {
    "sm_80": {**_MEMORY_BOUND, **_ATTENTION_SM_80},
    "sm_90": {**_MEMORY_BOUND, **_NORMS_SM_90, **_ATTENTION_SM_90},
    "sm_100": {**_MEMORY_BOUND, **_ATTENTION},
    "gfx942": {**_MEMORY_BOUND, **_ATTENTION},
}


def tile(kernel: str, target: _triton.Target | None = None) -> Tile:
    """Return the settings of `kernel` for `target`, by default the target of this process."""
    family = (target or _triton.target()).family
    found = _overrides.get(family, {}).get(kernel) or TILES[family][kernel]
    if _recorded is not None:
        _recorded[kernel] = found
    return found


def used_by(run: Callable[[], object]) -> dict[str, Tile]:
    """Call `run` and return the tiles of every kernel it launched."""
    global _recorded
    _recorded = found = {}
    try:
        run()
    finally:
        _recorded = None
    return found


@contextmanager
def override_tiles(entries: dict[str, dict[str, Tile]]) -> Iterator[None]:
    """Use `entries`, {family: {kernel: tile}}, instead of the table's inside the block."""
    global _overrides
    before, _overrides = _overrides, entries
    try:
        yield
    finally:
        _overrides = before


def read_tiles(path: Path) -> dict[str, dict[str, Tile]]:
    """Read and check the file of MIRO_TILES.

    Raises:
        ValueError: if a family, kernel or setting is unknown or a value is no tile size; the
            message names it.
    """
    found = json.loads(path.read_text())
    for family, kernels in found.items():
        if family not in TILES:
            raise ValueError(f"{path}: no family {family!r}; known: {', '.join(TILES)}")
        for kernel, settings in kernels.items():
            known = TILES[family].get(kernel)
            if known is None or settings.keys() != known.keys():
                raise ValueError(
                    f"{path}: {family}.{kernel} must be one of {', '.join(TILES[family])} with "
                    f"its settings {', '.join(known or ())}, got {', '.join(settings)}"
                )
            for name, value in settings.items():
                whole = isinstance(value, int) and value > 0
                if not whole or (name not in COUNTS and value & (value - 1)):
                    expected = "whole number above 0" if name in COUNTS else "power of 2"
                    raise ValueError(
                        f"{path}: {family}.{kernel}.{name} must be a {expected}, got {value!r}"
                    )
    return found


_overrides = read_tiles(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else {}
_recorded: dict[str, Tile] | None = None
