"""Fused operations of the MIRO flow transformer, as functions without parameters.

Each operation has a `<name>_reference` in plain torch, which is its specification, its CPU path and
the oracle of its tests. `use_backend` or the environment variable MIRO_KERNELS selects the backend;
`prewarm` compiles the kernels of a run before its first step.
"""

from miro_kernels.adaln import adaln, gated_residual_adaln, reward_adaln
from miro_kernels.adamw_ema import AdamWEMA
from miro_kernels.attention import attention
from miro_kernels.backend import use_backend
from miro_kernels.prewarm import prewarm
from miro_kernels.qk_norm_rope import qk_norm_rope
from miro_kernels.swiglu import swiglu

__all__ = [
    "AdamWEMA",
    "adaln",
    "attention",
    "gated_residual_adaln",
    "prewarm",
    "qk_norm_rope",
    "reward_adaln",
    "swiglu",
    "use_backend",
]
