"""Checks every op makes of its arguments, and the precision it computes in."""

from __future__ import annotations

import torch
from torch import Tensor


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


def widen(tensor: Tensor) -> Tensor:
    """The tensor in the precision ops compute in: fp32, or fp64 where it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
