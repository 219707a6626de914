"""NumPy's .npy format in memory, without copies; latents and text states are stored in it."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.lib import format as npy


def npy_bytes(array: np.ndarray) -> bytes:
    """Serialize an array in C order; equal arrays give equal bytes."""
    file = io.BytesIO()
    npy.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def npy_shape(buffer: memoryview | bytes) -> tuple[int, ...]:
    """Return the shape in the header of a .npy file."""
    return _parse_header(bytes(buffer[: _header_size(buffer)]))[1]


def npy_view(buffer: memoryview | bytes) -> np.ndarray:
    """Return the array of a .npy file as a read-only view of `buffer`.

    Raises:
        ValueError: it is not a complete .npy file of numbers in C order.
    """
    start = _header_size(buffer)
    dtype, shape, count = _parse_header(bytes(buffer[:start]))
    if len(buffer) != start + count * dtype.itemsize:
        raise ValueError(
            f"the .npy has {len(buffer) - start} bytes of data, its header says {shape} of {dtype}"
        )
    return np.frombuffer(buffer, dtype, count, start).reshape(shape)


def _header_size(buffer: memoryview | bytes) -> int:
    """Size in bytes of the header, including the magic string."""
    # Version 1 stores the header length in two bytes, versions 2 and 3 in four.
    start = 12 if len(buffer) > 6 and buffer[6] > 1 else 10
    return start + int.from_bytes(buffer[8:start], "little")


@lru_cache(maxsize=4096)
def _parse_header(data: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, number of elements). Cached: a dataset has one header per text length."""
    file = io.BytesIO(data)
    try:
        if npy.read_magic(file) == (1, 0):
            shape, fortran, dtype = npy.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = npy.read_array_header_2_0(file)
    except ValueError as error:
        raise ValueError(f"not a .npy file: {error}") from None
    if fortran or dtype.hasobject:
        raise ValueError(f"the .npy must hold numbers in C order: {dtype}, {fortran=}")
    return dtype, shape, int(np.prod(shape, dtype=np.int64))
