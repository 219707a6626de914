"""The tiles of every kernel on every family of devices, each with its reason.

A tile decides the order of sums, so all ranks of a run must use the same one: it is a function of
the family and of shapes, and nothing is timed during a run. `MIRO_TILES` may name a JSON file,
{family: {kernel: {setting: number}}}, whose entries replace the table's; ranks that read one file
use the same tiles. `python -m miro_kernels.tune` writes such a file on a machine with a GPU.
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
"""Settings that may be any number; the others are sizes of tiles, powers of 2."""

# Norms. A step takes `rows` rows of up to 256 channels a warp, 16 bytes of each row a thread in
# bf16, so that a sum over channels crosses few warps and a sum over rows none; wider rows take more
# warps, then fewer rows. A program walks over `tokens` of one sample, so that these rows share the
# modulation it sums in registers and, backward, the partial sums it writes: at 64 they are 4 % of
# the bytes, and the 0.36 B preset's batch still makes two programs for each multiprocessor. Forward
# takes fewer tokens where that would leave less than `programs` programs; backward does not, since
# there tokens decide the order of sums, which is not to depend on the size of the batch. With so
# few programs the next step's loads must be under way during a step's arithmetic: two stages.
NORM_FORWARD = {"rows": 4, "tokens": 64, "programs": 256, "warps": 8, "stages": 2}
NORM_BACKWARD = {"rows": 4, "tokens": 64, "programs": 1, "warps": 8, "stages": 2}

# Queries and keys. `elements` of each half of the heads a step, 16 bytes a thread; the same places
# of up to `samples` samples are walked over by one program, so that their angles are read once for
# all of them, if that leaves `programs` programs. At the preset these are all resident at once:
# four a multiprocessor forward, and two backward, whose sums take more registers.
QK_FORWARD = {"elements": 1024, "samples": 16, "programs": 512, "warps": 4, "stages": 2}
QK_BACKWARD = {"elements": 1024, "samples": 32, "programs": 256, "warps": 4, "stages": 2}

# Streams without reductions: enough independent 16-byte accesses a thread to hide the latency of
# one, few enough registers to keep all warps resident.
SWIGLU = {"elements": 2048, "columns": 1024, "warps": 4}
ADAMW = {"elements": 1024, "chunk": 8192, "warps": 4}

# On an H100 a third stage saves 8 % forward; backward nothing tried saves more than 2 %, and those
# tiles move more bytes (profiling/search_tiles.py).
_NORMS_SM_90: dict[str, Tile] = {"norm_forward": {**NORM_FORWARD, "stages": 3}}

_STREAMS: dict[str, Tile] = {
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


# Attention, by direction and head size. `queries` and `keys` are rows of a tile, `text` those of a
# tile of text keys: short, since what a text does not fill is computed for nothing. 128 rows that a
# program keeps read those it walks over 128 times less often than one; eight warps on them leave at
# most 128 registers a thread for two programs a multiprocessor where the head size allows, and
# never spill. A matrix unit of sm_90 and sm_100 takes 64 rows at least, so the rows kept by the
# kernel that makes dk and dv are 64 in a tile of text too. Head size 96 has 32 channels on its own,
# which 32 rows would spread over eight warps in less than 16 bytes a thread: 64.
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
    # fp32 is multiplied without tensor cores, in unrolled code that grows with the tile. A thread
    # keeps a whole row of q and of do, so that dq of head size 128 spills in any tile.
    **{
        f"{d}_{n}_fp32": (32, 32, 32, 8, 1)
        for d in ("forward", "queries", "keys")
        for n in (32, 64, 96, 128)
    },
)
# On sm_80 accumulators and operands are all registers: wider heads keep smaller tiles.
_ATTENTION_SM_80 = _ATTENTION | _attention(
    queries_128=(128, 32, 32, 8, 2), keys_96=(32, 64, 32, 4, 2)
)

# Found on an H100 at the 0.36 B preset (profiling/search_tiles.py): one group of four warps, which
# waits for no other, and three stages; many small programs hide one another's softmax. That keys
# are read by more programs costs nothing, since the second-level cache has them.
_ATTENTION_SM_90 = _ATTENTION | _attention(
    forward_64=(128, 64, 64, 4, 3), queries_64=(64, 32, 32, 4, 3), keys_64=(32, 64, 64, 4, 3)
)

TILES: dict[str, dict[str, Tile]] = {
    "sm_80": {**_STREAMS, **_ATTENTION_SM_80},
    "sm_90": {**_STREAMS, **_NORMS_SM_90, **_ATTENTION_SM_90},
    "sm_100": {**_STREAMS, **_ATTENTION},
    "gfx942": {**_STREAMS, **_ATTENTION},
}


def tile(kernel: str, target: _triton.Target | None = None) -> Tile:
    """The settings of `kernel` for `target`, or for the target of this process."""
    family = (target or _triton.target()).family
    found = _replaced.get(family, {}).get(kernel) or TILES[family][kernel]
    if _asked is not None:
        _asked[kernel] = found
    return found


def used_by(run: Callable[[], object]) -> dict[str, Tile]:
    """The tiles of every kernel that `run` launches."""
    global _asked
    _asked = found = {}
    try:
        run()
    finally:
        _asked = None
    return found


@contextmanager
def replaced(entries: dict[str, dict[str, Tile]]) -> Iterator[None]:
    """Let `entries`, {family: {kernel: tile}}, stand for the table's inside the block."""
    global _replaced
    before, _replaced = _replaced, entries
    try:
        yield
    finally:
        _replaced = before


def read_tiles(path: Path) -> dict[str, dict[str, Tile]]:
    """The file of MIRO_TILES.

    Raises:
        ValueError: it names a family, kernel or setting there is not, or gives one a value that is
            no size of a tile; the message says which.
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
                    kind = "whole number above 0" if name in COUNTS else "power of 2"
                    raise ValueError(
                        f"{path}: {family}.{kernel}.{name} must be a {kind}, got {value!r}"
                    )
    return found


_replaced = read_tiles(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else {}
_asked: dict[str, Tile] | None = None
