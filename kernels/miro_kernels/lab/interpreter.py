"""Triton's interpreter, patched to compute what a GPU computes.

TRITON_INTERPRET=1 runs kernels in numpy, which has no bf16. Triton 3.8 stores such values as their
16 bits, so that products, sums and comparisons silently operate on the bits, and casts truncate.
`patch_interpreter` makes them operate on fp32 values, rounded once to nearest even like one GPU
instruction. It also truncates the operands of a tf32 `tl.dot` to tf32's bits; the stock interpreter
multiplies in full fp32, which would hide a missing `input_precision`.

Not modelled: the rounding of sums inside one reduction, the last bits of exp2, rsqrt and the like,
and anything that depends on threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs

from miro_kernels.lab.private_triton import (
    InterpreterBuilder,
    ReduceOps,
    ScanOps,
    TensorHandle,
    ir,
)

BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
FLOATS = {tl.float16, tl.bfloat16, tl.float32}
TF32_MASK = np.uint32(0xFFFFE000)  # sign, 8 exponent bits, 10 mantissa bits


def interpreting() -> bool:
    """Whether TRITON_INTERPRET was set: kernels of this process run in the interpreter."""
    return bool(knobs.runtime.interpret)


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 numbers, which are given as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 values as bf16 in uint16, rounded to nearest even like `cvt.rn.bf16`."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _round_to_bf16(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(fp32_to_bf16(handle.data), tl.bfloat16)


def _in_fp32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Widen the bf16 operands of a builder method, and round its result once."""

    @functools.wraps(method)
    def patched(self: Any, *arguments: Any) -> TensorHandle:
        if not any(map(_is_bf16, arguments)):
            return method(self, *arguments)
        result = method(self, *map(_widen, arguments))
        is_comparison = result.data.dtype == np.bool_
        return result if is_comparison or result.dtype != tl.float32 else _round_to_bf16(result)

    return patched


def _binary(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    patched = _in_fp32(method)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        return (method if op in BITWISE else patched)(self, lhs, rhs, op)

    return binary_op


def _ternary(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    patched = _in_fp32(method)

    def ternary_op(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Any) -> Any:
        # tl.where copies bits; widening would lose a NaN's payload.
        return (method if op is np.where else patched)(self, a, b, c, op)

    return ternary_op


def _cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast_impl(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
        if source.dtype.scalar == dtype.scalar:
            return source
        source = _widen(source)
        if dtype.scalar == tl.bfloat16:
            return _round_to_bf16(TensorHandle(source.data.astype(np.float32), tl.float32))
        return method(self, source, dtype)

    return cast_impl


def _float_cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_fp_to_fp(self: Any, source: TensorHandle, dtype: Any, rounding: Any) -> TensorHandle:
        nearest = rounding in (None, ir.ROUNDING_MODE.RTNE)
        if nearest and {source.dtype.scalar, dtype.scalar} <= FLOATS:
            return self.cast_impl(source, dtype)
        return method(self, source, dtype, rounding)

    return create_fp_to_fp


def _dot(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def operand(handle: TensorHandle, precision: Any) -> TensorHandle:
        if handle.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            bits = np.ascontiguousarray(handle.data).view(np.uint32) & TF32_MASK
            return TensorHandle(bits.view(np.float32), tl.float32)
        return _widen(handle)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> TensorHandle:
        return method(self, operand(a, precision), operand(b, precision), d, precision, *rest)

    return create_dot


def _reduction(method: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, inputs: tuple) -> Any:
        """Accumulate bf16 reductions and scans in fp32, and round the result once."""
        is_bf16 = [_is_bf16(value.handle) for value in inputs]
        if not any(is_bf16):
            return method(self, inputs)
        wide = [tl.tensor(_widen(v.handle), _with_dtype(v.type, tl.float32)) for v in inputs]
        results = method(self, tuple(wide))
        if not isinstance(results, list | tuple):
            results = (results,)
        return tuple(
            tl.tensor(_round_to_bf16(r.handle), _with_dtype(r.type, tl.bfloat16)) if narrow else r
            for r, narrow in zip(results, is_bf16, strict=False)
        )

    return apply_impl


def _with_dtype(kind: Any, dtype: Any) -> Any:
    return tl.block_type(dtype, kind.shape) if kind.is_block() else dtype


@functools.cache
def patch_interpreter() -> None:
    """Patch the interpreter of this process, once and for good."""
    builder: Any = InterpreterBuilder
    patches = {
        "binary_op": _binary,
        "ternary_op": _ternary,
        "unary_op": _in_fp32,
        "create_fma": _in_fp32,
        "create_rsqrt": _in_fp32,
        "create_erf": _in_fp32,
        "cast_impl": _cast,
        "create_fp_to_fp": _float_cast,
        "create_dot": _dot,
    }
    for name, patch in patches.items():
        setattr(builder, name, patch(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: _round_to_bf16(
        TensorHandle(np.array([value], np.float32), tl.float32)
    )
    for reduction in (ReduceOps, ScanOps):
        reduction.apply_impl = _reduction(reduction.apply_impl)
