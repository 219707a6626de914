"""Triton's interpreter, corrected to compute what a GPU computes.

TRITON_INTERPRET=1 runs kernels with numpy. Numpy has no bf16, and Triton (3.8) keeps such values as
their 16 bits: products, sums and comparisons then work on the bits, silently, and casts truncate.
`correct` makes them work on the values, in fp32, rounded once to the nearest even: what one GPU
instruction does. It also cuts the operands of a tf32 product to the bits a tensor core reads, which
the stock interpreter multiplies in full fp32, so that a product which should have asked for more
shows its error here.

What the interpreter still does not show: the rounding of sums inside one reduction, the last bits
of exp2, rsqrt and the like, and anything that depends on threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
FLOATS = {tl.float16, tl.bfloat16, tl.float32}
TF32_BITS = np.uint32(0xFFFFE000)  # sign, 8 of exponent, 10 of mantissa


def interpreting() -> bool:
    """Whether kernels of this process run in the interpreter."""
    return bool(knobs.runtime.interpret)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 numbers given as their 16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values: np.ndarray) -> np.ndarray:
    """fp32 values as bf16 bits, rounded to the nearest and ties to the even, as cvt.rn.bf16."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Any:
    return TensorHandle(from_bits(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_bits(handle.data), tl.bfloat16)


def _in_fp32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A builder method whose bf16 operands are widened and whose result is rounded once."""

    @functools.wraps(method)
    def corrected(self: Any, *arguments: Any) -> TensorHandle:
        if not any(map(_is_bf16, arguments)):
            return method(self, *arguments)
        result = method(self, *map(_wide, arguments))
        compared = result.data.dtype == np.bool_
        return result if compared or result.dtype != tl.float32 else _narrow(result)

    return corrected


def _binary(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    corrected = _in_fp32(method)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        return (method if op in BITWISE else corrected)(self, lhs, rhs, op)

    return binary_op


def _ternary(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    corrected = _in_fp32(method)

    def ternary_op(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Any) -> Any:
        # A select copies bits; widening would only lose the payload of a NaN.
        return (method if op is np.where else corrected)(self, a, b, c, op)

    return ternary_op


def _cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast_impl(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
        if source.dtype.scalar == dtype.scalar:
            return source
        source = _wide(source)
        if dtype.scalar == tl.bfloat16:
            return _narrow(TensorHandle(source.data.astype(np.float32), tl.float32))
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
            bits = np.ascontiguousarray(handle.data).view(np.uint32) & TF32_BITS
            return TensorHandle(bits.view(np.float32), tl.float32)
        return _wide(handle)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> TensorHandle:
        return method(self, operand(a, precision), operand(b, precision), d, precision, *rest)

    return create_dot


def _reduction(method: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, inputs: tuple) -> Any:
        """Reductions and scans over bf16 accumulate in fp32 and round the result once."""
        low = [_is_bf16(value.handle) for value in inputs]
        if not any(low):
            return method(self, inputs)
        wide = [tl.tensor(_wide(v.handle), _retyped(v.type, tl.float32)) for v in inputs]
        results = method(self, tuple(wide))
        if not isinstance(results, list | tuple):
            results = (results,)
        return tuple(
            tl.tensor(_narrow(r.handle), _retyped(r.type, tl.bfloat16)) if was_low else r
            for r, was_low in zip(results, low, strict=False)
        )

    return apply_impl


def _retyped(kind: Any, dtype: Any) -> Any:
    return tl.block_type(dtype, kind.shape) if kind.is_block() else dtype


@functools.cache
def correct() -> None:
    """Correct the interpreter of this process, once; there is no way back, nor a need for one."""
    builder: Any = InterpreterBuilder
    corrections = {
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
    for name, correction in corrections.items():
        setattr(builder, name, correction(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: _narrow(
        TensorHandle(np.array([value], np.float32), tl.float32)
    )
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        reduction.apply_impl = _reduction(reduction.apply_impl)
