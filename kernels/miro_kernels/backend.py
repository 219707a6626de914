"""Backend selection: whether Triton, plain torch or flash-attn computes an op.

    auto        Triton for tensors on a CUDA or ROCm device; torch on a CPU and for tensors that the
                kernels do not support (fp64, very wide rows). Logs each reason once.
    triton      Triton, or a ValueError
    torch       the references
    flash_attn  flash-attn for attention without text, or a ValueError; the other ops as `auto`

The backend is set by `use_backend`, else by the environment variable MIRO_KERNELS, else `auto`.
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

# Module globals instead of a context variable: torch.compile guards on them, and so recompiles when
# the backend changes.
_override: str | None = None
_cpu_tensors_allowed = False
_logged: set[str] = set()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_default = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def backend() -> str:
    """Return the name of the current backend: auto, triton, torch or flash_attn."""
    return _default if _override is None else _override


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Set the backend inside the block; `auto` falls back to MIRO_KERNELS if that is set.

    Raises:
        ValueError: if there is no backend `name`.
    """
    global _override
    before = _override
    _override = None if _checked(name, "the kernels' backend") == "auto" else name
    try:
        yield
    finally:
        _override = before


@contextmanager
def allow_cpu_tensors() -> Iterator[None]:
    """Let Triton ops take CPU tensors: the lab compiles their launches without running them."""
    global _cpu_tensors_allowed
    before, _cpu_tensors_allowed = _cpu_tensors_allowed, True
    try:
        yield
    finally:
        _cpu_tensors_allowed = before


def unsupported_reason(tensor: Tensor) -> str | None:
    """Return why Triton cannot compute on `tensor`, or None if it can."""
    if not _triton.AVAILABLE:
        return "Triton is not installed"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take fp32, bf16 and fp16, not {tensor.dtype}"
    if tensor.device.type != "cuda" and not (_cpu_tensors_allowed or _triton.INTERPRETING):
        return f"the tensors are on {tensor.device.type} and TRITON_INTERPRET was not set"
    return None


def select_backend(op: str, tensor: Tensor, unsupported: str | None = None) -> str:
    """Return `triton` or `torch` for this call of `op`.

    Args:
        op: name of the op, for messages.
        tensor: the argument whose device and dtype decide.
        unsupported: why the op's kernels cannot take these arguments; None if they can.

    Raises:
        ValueError: if the backend is `triton` and Triton cannot compute; the message says why.
    """
    name = backend()
    if name == "torch":
        return "torch"
    reason = unsupported_reason(tensor) or unsupported
    if name == "triton":
        if reason is not None:
            raise ValueError(
                f"{op}: the backend triton was requested, but {reason}; use auto or torch"
            )
        return "triton"
    if reason is None and tensor.device.type != "cuda":
        reason = "the tensors are on the CPU"
    selected = "triton" if reason is None else "torch"
    # Dynamo cannot trace logging, so a compiled run calls `check_backend` first.
    if not torch.compiler.is_compiling():
        _log_once(op, selected, reason or "the tensors are on a device it compiles for")
    return selected


def check_backend(device: torch.device | str) -> None:
    """Check before a run's first step that the backend supports `device`; log what `auto` selects.

    Raises:
        ValueError: if it cannot.
    """
    select_backend("miro_kernels", torch.empty(0, device=torch.device(device)))


def _log_once(op: str, selected: str, reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        log.info("kernels: auto selected %s for %s and similar ops: %s", selected, op, reason)
