"""Argument checks of the ops, and the precision they compute in."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], form: str) -> None:
    """Raise ValueError unless `tensor` has the shape `expected`, in letters `form`."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must be {form} = {expected}, got {tuple(tensor.shape)}")


def check_rank(op: str, name: str, tensor: Tensor, form: str) -> None:
    """Raise ValueError unless `tensor` has as many dimensions as `form`, e.g. "B N D"."""
    if tensor.ndim != len(form.split()):
        raise ValueError(
            f"{op}: {name} must be ({', '.join(form.split())}), got shape {tuple(tensor.shape)}"
        )


def check_floats(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all are fp32, bf16, fp16 or fp64 and on the first one's device."""
    first, *_ = tensors
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{op}: {name} must be fp32, bf16, fp16 or fp64, got {_short(tensor.dtype)}"
            )
        check_device(op, name, tensor, first, tensors[first])


def check_integers(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` has an integer dtype."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{op}: {name} must have an integer dtype, got {_short(tensor.dtype)}")


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless `tensor` is on the device of `other`."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on {other.device} as {other_name} is, got {tensor.device}"
        )


def widen(tensor: Tensor) -> Tensor:
    """Cast to the precision the ops compute in: fp32, or fp64 if the tensor already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
