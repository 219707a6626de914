"""Adaptive layer norm: alone, after a gated residual, and modulated by rewards."""

from miro_kernels.adaln.op import adaln, gated_residual_adaln, reward_adaln
from miro_kernels.adaln.reference import (
    adaln_reference,
    gated_residual_adaln_reference,
    reward_adaln_reference,
)

__all__ = [
    "adaln",
    "adaln_reference",
    "gated_residual_adaln",
    "gated_residual_adaln_reference",
    "reward_adaln",
    "reward_adaln_reference",
]
