"""Which code computes an op: Triton, plain torch or flash-attn. Decided here and nowhere else.

    auto        Triton for tensors on a CUDA or ROCm device, torch for the rest and for what the
                kernels do not take (fp64, very wide rows); says once what it chose and why
    triton      Triton, or a ValueError
    torch       the references
    flash_attn  flash-attn for attention without text, or a ValueError; the other ops as `auto`

The choice is `use_backend`'s, or else the environment variable MIRO_KERNELS's, or else `auto`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from miro_kernels import _triton

log = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "torch", "flash_attn"]
BACKENDS = get_args(Backend)
VARIABLE = "MIRO_KERNELS"

# Module globals and no context variable: torch.compile guards on them, and compiles anew when the
# choice has changed.
_named: str | None = None
_capturing = False
_said: set[str] = set()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_default = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def backend() -> str:
    """The name that decides now: auto, triton, torch or flash_attn."""
    return _default if _named is None else _named


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let `name` decide inside the block. `auto` leaves it to MIRO_KERNELS, where that is set.

    Raises:
        ValueError: there is no such backend.
    """
    global _named
    before = _named
    _named = None if _checked(name, "the kernels' backend") == "auto" else name
    try:
        yield
    finally:
        _named = before


@contextmanager
def allow_cpu_tensors() -> Iterator[None]:
    """Let Triton ops take CPU tensors: the laboratory compiles their launches and runs none."""
    global _capturing
    before, _capturing = _capturing, True
    try:
        yield
    finally:
        _capturing = before


def unsupported_reason(tensor: Tensor) -> str | None:
    """Why Triton cannot compute on `tensor`, or None where it can."""
    if not _triton.AVAILABLE:
        return "Triton is not installed"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take fp32, bf16 and fp16, not {tensor.dtype}"
    if tensor.device.type != "cuda" and not (_capturing or _triton.INTERPRETING):
        return f"the tensors are on {tensor.device.type} and TRITON_INTERPRET was not set"
    return None


def select_backend(op: str, tensor: Tensor, unsupported: str | None = None) -> str:
    """`triton` or `torch` for this call of `op`.

    Args:
        op: the op's name, for messages.
        tensor: the argument whose device and dtype decide.
        unsupported: why the op's kernels cannot take these arguments; None where they can.

    Raises:
        ValueError: `triton` was asked for and cannot be had; the message says why.
    """
    name = backend()
    if name == "torch":
        return "torch"
    reason = unsupported_reason(tensor) or unsupported
    if name == "triton":
        if reason is not None:
            raise ValueError(f"{op}: the backend triton was asked for, but {reason}")
        return "triton"
    if reason is None and tensor.device.type != "cuda":
        reason = "the tensors are on the CPU"
    choice = "triton" if reason is None else "torch"
    # Dynamo cannot trace logging; a run that compiles calls `ready` first.
    if not torch.compiler.is_compiling():
        _say(op, choice, reason)
    return choice


def check_backend(device: torch.device | str) -> None:
    """Raise ValueError if the backend asked for cannot compute there; say once what `auto` chose.

    For a run to call before its first step: nothing can be said from inside a compiled one.
    """
    select_backend("miro_kernels", torch.empty(0, device=torch.device(device)))


def _say(op: str, choice: str, reason: str | None) -> None:
    why = reason or "the tensors are on a device it compiles for"
    if why not in _said:
        _said.add(why)
        log.info("kernels: auto chose %s for %s and ops like it: %s", choice, op, why)
