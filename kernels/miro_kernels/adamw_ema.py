"""AdamW, the moving average of the weights and the low-precision copy, as one optimizer.

    m ← β₁·m + (1 − β₁)·g            v ← β₂·v + (1 − β₂)·g²
    w ← w·(1 − lr·λ) − lr·m̂ / (sqrt(v̂) + ε)          m̂, v̂: m and v without their bias to zero
    e ← e + (1 − d)·(w − e)           p ← w in the parameter's dtype

w is the fp32 master of the parameter p (p itself where p is fp32), e the average that sampling
uses. e and w are optimizer state, so that whatever shards or saves the optimizer shards and saves
them. Source: AdamW, arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def adamw_ema_reference(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
) -> None:
    """One step in place, over lists of tensors; everything but params and grads is fp32."""
    wide = [grad.float() for grad in grads]
    torch._foreach_lerp_(exp_avgs, wide, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, wide, wide, 1 - betas[1])
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - betas[1] ** step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(masters, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(masters, exp_avgs, denominators, -lr / (1 - betas[0] ** step))
    torch._foreach_lerp_(emas, masters, 1 - ema_decay)
    for param, master in zip(params, masters, strict=True):
        if param is not master:
            param.copy_(master)


class AdamWEMA(torch.optim.Optimizer):
    """torch.optim.AdamW that also keeps an exponential moving average of the weights.

    Args:
        params: tensors or groups, as every torch optimizer takes them; fp32, bf16 or fp16.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        ema_decay: d above; a group's value may be changed between steps. 0 keeps no average.

    State of each parameter: `master` (fp32, only where the parameter is not), `exp_avg`,
    `exp_avg_sq`, `ema` (all fp32), and `step` (int).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float = 0.999,
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0:
            raise ValueError(
                f"AdamWEMA: lr and weight_decay must be at least 0 and eps above 0, "
                f"got lr={lr}, weight_decay={weight_decay}, eps={eps}"
            )
        shares = {"betas[0]": betas[0], "betas[1]": betas[1], "ema_decay": ema_decay}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"AdamWEMA: {name} must be in [0, 1), got {value}")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ema_decay=ema_decay)
        super().__init__(params, defaults)

    def master(self, param: Tensor) -> Tensor:
        """The fp32 weights behind `param`: its master, or itself where it is fp32."""
        return param if param.dtype == torch.float32 else self._state(param)["master"]

    def ema(self, param: Tensor) -> Tensor:
        """The fp32 average of `param`'s weights."""
        return self._state(param)["ema"]

    def _state(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            weights = param.detach().float()
            if param.dtype != torch.float32:
                state["master"] = weights.clone()
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weights)
            state["exp_avg_sq"] = torch.zeros_like(weights)
            state["ema"] = weights.clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer, but the state stays fp32 where torch casts it to bf16."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][key] = value.to(param.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "AdamWEMA does not re-evaluate the model"
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                self._state(param)["step"] += 1
            self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update the parameters of one group, all of which have a gradient."""
        # All at once, but for parameters that had no gradient at some step and count fewer.
        for step in sorted({self.state[param]["step"] for param in params}):
            chosen = [param for param in params if self.state[param]["step"] == step]
            states = [self.state[param] for param in chosen]
            adamw_ema_reference(
                chosen,
                [param.grad for param in chosen if param.grad is not None],
                [self.master(param) for param in chosen],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["ema"] for state in states],
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                ema_decay=group["ema_decay"],
            )
