"""Undocumented names of Triton that the lab uses, imported here only; written for Triton 3.8."""

# ruff: noqa: F401
from triton._C.libtriton import ir
from triton.runtime import driver
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    ReduceOps,
    ScanOps,
    TensorHandle,
    interpreter_builder,
    interpreter_semantic,
)
from triton.runtime.interpreter import _get_np_dtype as np_dtype
from triton.runtime.jit import JITFunction

ATTRIBUTES = """
    GridExecutor.__call__ JITFunction.run ReduceOps.apply_impl ScanOps.apply_impl driver._active
    InterpreterBuilder.binary_op InterpreterBuilder.cast_impl InterpreterBuilder.create_atomic_cas
    InterpreterBuilder.create_atomic_rmw InterpreterBuilder.create_dot
    InterpreterBuilder.create_erf InterpreterBuilder.create_fma InterpreterBuilder.create_fp_to_fp
    InterpreterBuilder.create_masked_load InterpreterBuilder.create_masked_store
    InterpreterBuilder.create_rsqrt InterpreterBuilder.ternary_op
    InterpreterBuilder.unary_op interpreter_semantic.load
    ir.INPUT_PRECISION ir.ROUNDING_MODE
""".split()
"""What the lab calls or patches on them; tests/kernels/test_private_names.py checks each."""
