"""Muon for weight matrices, with fp32 master weights and EMA in the optimizer.

    b ← μ·b + (1 − μ)·g                         u = (1 − μ)·g + μ·b
    w ← w·(1 − lr·λ) − lr·0.2·sqrt(max(rows, columns))·orthogonalize(u)
    e ← e + (1 − d)·(w − e)                     p ← w in the parameter's dtype

orthogonalize(u) sets the singular values of u to about 1 by five steps of a Newton-Schulz
iteration; the factor gives updates the RMS of AdamW's. Sources: Keller Jordan, "Muon" (2024);
the factor from Moonlight, arXiv 2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from miro.utils.torch_internals import (
    foreach_add_,
    foreach_lerp,
    foreach_lerp_,
    foreach_mul,
    foreach_mul_,
)
from miro_kernels import AdamWEMA

COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of (n, rows, columns) to about 0.7 to 1.2; bf16 inside."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(STEPS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.float()
    return x.transpose(1, 2) if tall else x


class MuonEMA(AdamWEMA):
    """Muon for the parameter groups with `use_muon: True`, AdamWEMA for the others.

    The state of a Muon parameter is that of AdamWEMA without `exp_avg_sq`; `exp_avg` is b above.

    Raises:
        ValueError: a parameter of a Muon group is not a matrix.
    """

    def __init__(self, params: Iterable[Any], momentum: float = 0.95, **options: Any) -> None:
        super().__init__(params, **options)
        self._momentum = momentum
        self._muon_params = set()
        for group in self.param_groups:
            for param in group["params"] if group.get("use_muon") else ():
                if param.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter {tuple(param.shape)}")
                self._muon_params.add(param)

    def _state(self, param: Tensor) -> dict[str, Any]:
        state = super()._state(param)
        if param in self._muon_params:
            state.pop("exp_avg_sq", None)
        return state

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not group.get("use_muon"):
            super()._update(group, params)
            return
        # A host sync, as in the reference of AdamWEMA.
        scale = 1.0 if self.grad_scale is None else self.grad_scale.item()
        if not scale >= 0:
            return
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for param in params:
            by_shape[param.shape].append(param)
        # Matrices of one shape go through the iteration as one batched product.
        for chosen in by_shape.values():
            states = [self.state[param] for param in chosen]
            masters = [self.master(param) for param in chosen]
            momenta = [state["exp_avg"] for state in states]
            grads = [param.grad.float() for param in chosen if param.grad is not None]
            if scale != 1:
                grads = list(foreach_mul(grads, scale))
            foreach_lerp_(momenta, grads, 1 - self._momentum)
            steps = orthogonalize(torch.stack(foreach_lerp(grads, momenta, self._momentum)))
            size = 0.2 * max(chosen[0].shape) ** 0.5
            foreach_mul_(masters, 1 - group["lr"] * group["weight_decay"])
            foreach_add_(masters, list(steps.unbind()), alpha=-group["lr"] * size)
            foreach_lerp_([s["ema"] for s in states], masters, 1 - group["ema_decay"])
            for param, master in zip(chosen, masters, strict=True):
                if param is not master:
                    param.copy_(master)
