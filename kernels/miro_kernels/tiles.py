"""The tiles of every kernel on every family of devices, each with its reason.

A tile decides the order of sums, so all ranks of a run must use the same one: it is a function of
the family and of shapes, and nothing is timed during a run. `MIRO_TILES` may name a JSON file,
{family: {kernel: {setting: number}}}, whose entries replace the table's; ranks that read one file
use the same tiles. `tune` writes such a file on a machine with a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from miro_kernels import _triton

Tile = Mapping[str, int]

VARIABLE = "MIRO_TILES"

# Norms. A step takes `elements` of a tile (rows x channels, rounded up to a power of 2). A program
# walks over up to `tokens` tokens of one sample, so that the modulation it sums in registers, and
# the partial sums its backward writes, are shared by that many rows; at least `programs` programs
# are made where the batch has that many rows, which is one wave of two a multiprocessor.
NORM_FORWARD = {"elements": 4096, "tokens": 64, "programs": 256, "warps": 8}
NORM_BACKWARD = {"elements": 4096, "tokens": 64, "programs": 256, "warps": 8}

# Queries and keys. `rows` (token, head) pairs a step; the same places of up to `samples` samples
# are walked over by one program, so that their angles are read once for all of them.
QK_FORWARD = {"rows": 32, "samples": 8, "programs": 512, "warps": 4}
QK_BACKWARD = {"rows": 32, "samples": 16, "programs": 512, "warps": 4}

# Streams without reductions: enough independent 16-byte accesses a thread to hide the latency of
# one, few enough registers to keep all warps resident.
SWIGLU = {"elements": 2048, "columns": 1024, "warps": 4}
ADAMW = {"elements": 1024, "chunk": 8192, "warps": 4}

_STREAMS: dict[str, Tile] = {
    "norm_forward": NORM_FORWARD,
    "norm_backward": NORM_BACKWARD,
    "qk_forward": QK_FORWARD,
    "qk_backward": QK_BACKWARD,
    "swiglu_forward": SWIGLU,
    "swiglu_backward": SWIGLU,
    "adamw_ema": ADAMW,
}

TILES: dict[str, dict[str, Tile]] = {
    "sm_80": {**_STREAMS},
    "sm_90": {**_STREAMS},
    "sm_100": {**_STREAMS},
    "gfx942": {**_STREAMS},
}


def tile(kernel: str, target: _triton.Target | None = None) -> Tile:
    """The settings of `kernel` for `target`, or for the target of this process."""
    family = (target or _triton.target()).family
    return _replaced.get(family, {}).get(kernel) or TILES[family][kernel]


def read_tiles(path: Path) -> dict[str, dict[str, Tile]]:
    """The file of MIRO_TILES.

    Raises:
        ValueError: it names a family, kernel or setting there is not; the message says which.
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
    return found


_replaced = read_tiles(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else {}
