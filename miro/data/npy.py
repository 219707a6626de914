"""NumPy's .npy format in memory: how latents and text states lie in a shard."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.lib import format as npy


def npy_bytes(array: np.ndarray) -> bytes:
    """The .npy file of an array, C order; equal arrays give equal bytes."""
    file = io.BytesIO()
    npy.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def npy_shape(buffer: memoryview | bytes) -> tuple[int, ...]:
    """The shape of a .npy file's array, by its header alone."""
    return _parse_header(bytes(buffer[: _start(buffer)]))[1]


def npy_view(buffer: memoryview | bytes) -> np.ndarray:
    """The array of a .npy file as a read-only view of `buffer`: nothing is copied.

    ValueError for anything that is not a whole .npy file of plain numbers in C order.
    """
    stop = _start(buffer)
    dtype, shape, count = _parse_header(bytes(buffer[:stop]))
    if len(buffer) != stop + count * dtype.itemsize:
        raise ValueError(
            f"the .npy has {len(buffer) - stop} bytes of numbers, its header {shape} of {dtype}"
        )
    return np.frombuffer(buffer, dtype, count, stop).reshape(shape)


def _start(buffer: memoryview | bytes) -> int:
    """Where the numbers of a .npy file begin."""
    # Version 1 states its header's length in two bytes, versions 2 and 3 in four.
    wide = len(buffer) > 6 and buffer[6] > 1
    start = 12 if wide else 10
    return start + int.from_bytes(buffer[8:start], "little")


@lru_cache(maxsize=4096)
def _parse_header(data: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, numbers) of a header. Cached: a data set has few, one per length of text."""
    file = io.BytesIO(data)
    try:
        if npy.read_magic(file) == (1, 0):
            shape, fortran, dtype = npy.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = npy.read_array_header_2_0(file)
    except ValueError as error:
        raise ValueError(f"not a .npy file: {error}") from None
    if fortran or dtype.hasobject:
        raise ValueError(f"a .npy of plain numbers in C order is needed, got {dtype}")
    return dtype, shape, int(np.prod(shape, dtype=np.int64))
