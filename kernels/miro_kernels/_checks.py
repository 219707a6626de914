"""Checks every op makes of its arguments, and the precision it computes in."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], form: str) -> None:
    """Raise ValueError unless `tensor` has the `expected` sizes, which `form` names."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must be {form} = {expected}, got {tuple(tensor.shape)}")


def check_rank(op: str, name: str, tensor: Tensor, form: str) -> None:
    """Raise ValueError unless `tensor` has as many dimensions as `form` ("B N D") names."""
    if tensor.ndim != len(form.split()):
        raise ValueError(
            f"{op}: {name} must be ({', '.join(form.split())}), got shape {tuple(tensor.shape)}"
        )


def check_floats(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all are fp32, bf16, fp16 or fp64, and on the first one's device."""
    first, *_ = tensors
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{op}: {name} must be fp32, bf16, fp16 or fp64, got {_short(tensor.dtype)}"
            )
        check_device(op, name, tensor, first, tensors[first])


def check_integers(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` holds integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{op}: {name} must hold integers, got {_short(tensor.dtype)}")


def check_device(op: str, name: str, tensor: Tensor, other: str, at: Tensor) -> None:
    """Raise ValueError unless `tensor` is on the device of `at`, which is named `other`."""
    if tensor.device != at.device:
        raise ValueError(f"{op}: {name} must be on {at.device} as {other} is, got {tensor.device}")


def widen(tensor: Tensor) -> Tensor:
    """The tensor in the precision ops compute in: fp32, or fp64 where it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
