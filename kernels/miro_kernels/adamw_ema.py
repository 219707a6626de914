"""AdamW, an exponential moving average (EMA) of the weights and the low-precision copy, fused.

    m ← β₁·m + (1 − β₁)·g            v ← β₂·v + (1 − β₂)·g²
    w ← w·(1 − lr·λ) − lr·m̂ / (sqrt(v̂) + ε)          m̂, v̂: bias-corrected m and v
    e ← e + (1 − d)·(w − e)           p ← w in the parameter's dtype

w is the fp32 master of the parameter p (p itself if p is fp32) and e the EMA, which sampling uses.
Both are optimizer state, so whatever shards or saves the optimizer also shards and saves them.
Source: AdamW, arXiv 1711.05101.

The kernel loads g, w, m, v, e and stores w, m, v, e, p once: 36 bytes per bf16 parameter, the
least possible. One launch updates all parameters of a group with the same dtypes, through a table
of pointers in device memory. The table, some kilobytes, is rebuilt and copied from pinned memory
without a sync at each step, because gradients are reallocated. Step and rates are launch arguments.

`grad_scale`, for clipping and for skipping a step, is a scalar on the device: the kernel multiplies
g by it, and changes nothing if it is negative or NaN.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from miro_kernels._triton import ceil_div, counts_no_flops, foreach, jit, tl
from miro_kernels.backend import select_backend
from miro_kernels.tiles import tile


def adamw_ema_reference(
    params: list[Tensor], grads: list[Tensor], masters: list[Tensor], exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor], emas: list[Tensor], *, step: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, ema_decay: float,
    grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Update lists of tensors in place by one step; all but params and grads are fp32.

    Reading `grad_scale` synchronises with a GPU.
    """
    wide = [grad.float() for grad in grads]
    if grad_scale is not None:
        scale = grad_scale.item()
        if not scale >= 0:
            return
        if scale != 1:
            wide = list(foreach.mul(wide, scale))
    foreach.lerp_(exp_avgs, wide, 1 - betas[0])
    foreach.mul_(exp_avg_sqs, betas[1])
    foreach.addcmul_(exp_avg_sqs, wide, wide, 1 - betas[1])
    denominators = foreach.sqrt(exp_avg_sqs)
    foreach.div_(denominators, (1 - betas[1] ** step) ** 0.5)
    foreach.add_(denominators, eps)
    foreach.mul_(masters, 1 - lr * weight_decay)
    foreach.addcdiv_(masters, exp_avgs, denominators, -lr / (1 - betas[0] ** step))
    foreach.lerp_(emas, masters, 1 - ema_decay)
    for param, master in zip(params, masters, strict=True):
        if param is not master:
            param.copy_(master)


@jit
def _kernel(
    table_ptr, chunks_ptr, grad_scale_ptr, param_like_ptr, grad_like_ptr, decay, step_size, eps,
    one_minus_beta1, beta2, one_minus_beta2, bias_correction2_sqrt, one_minus_ema_decay,
    SCALED: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update CHUNK elements of one parameter; the `like` pointers only carry their dtypes."""
    row = table_ptr + tl.load(chunks_ptr + 2 * tl.program_id(0)) * 7
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1) * CHUNK
    param_ptr = tl.load(row).to(param_like_ptr.dtype)
    grad_ptr = tl.load(row + 1).to(grad_like_ptr.dtype)
    master_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    exp_avg_sq_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    ema_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 6)
    if ALIGNED:
        # Pointers loaded from memory carry no divisibility hints, unlike pointer arguments.
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        master_ptr, exp_avg_ptr = tl.multiple_of(master_ptr, 16), tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr, ema_ptr = tl.multiple_of(exp_avg_sq_ptr, 16), tl.multiple_of(ema_ptr, 16)
        size = tl.multiple_of(size, 16)
    count = tl.minimum(CHUNK, size - first)
    scale = 1.0
    if SCALED:
        scale = tl.load(grad_scale_ptr)
        # Skip the step if the scale is negative or NaN.
        count = tl.where(scale >= 0, count, 0)
    for start in range(0, count, BLOCK):
        offsets = first + start + tl.arange(0, BLOCK)
        mask = offsets < size
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        master = tl.load(master_ptr + offsets, mask=mask, other=0.0)
        exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
        ema = tl.load(ema_ptr + offsets, mask=mask, other=0.0)
        exp_avg += one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
        denominator = tl.sqrt(exp_avg_sq) / bias_correction2_sqrt + eps
        master = master * decay - step_size * (exp_avg / denominator)
        # The formula of torch.lerp, which gives exactly the master for ema_decay = 0.
        change = master - ema
        ema = tl.where(
            one_minus_ema_decay < 0.5,
            ema + one_minus_ema_decay * change,
            master - change * (1 - one_minus_ema_decay),
        )
        tl.store(master_ptr + offsets, master, mask=mask)
        tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
        tl.store(ema_ptr + offsets, ema, mask=mask)
        if COPY:
            tl.store(param_ptr + offsets, master.to(param_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """Table row and chunk of the parameter for each program: (programs, 2) int64."""
    pairs = [(row, n) for row, size in enumerate(sizes) for n in range(ceil_div(size, chunk))]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(device)


@torch.library.custom_op(
    "miro::adamw_ema", mutates_args=("params", "masters", "exp_avgs", "exp_avg_sqs", "emas")
)
def adamw_ema_op(
    params: list[Tensor], grads: list[Tensor], masters: list[Tensor], exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor], emas: list[Tensor], step: int, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, ema_decay: float,
    grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Update as the reference, in one launch per combination of dtypes and alignment."""
    launches: dict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)
    for tensors in zip(params, grads, masters, exp_avgs, exp_avg_sqs, emas, strict=True):
        tensors = (tensors[0], tensors[1].contiguous(), *tensors[2:])
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors) and tensors[0].numel() % 16 == 0
        launches[tensors[0].dtype, tensors[1].dtype, aligned].append(tensors)
    settings = tile("adamw_ema")
    for (dtype, _, aligned), rows in launches.items():
        device = rows[0][0].device
        pointers = [[*(t.data_ptr() for t in tensors), tensors[0].numel()] for tensors in rows]
        table = torch.tensor(pointers, dtype=torch.int64, pin_memory=device.type == "cuda")
        chunks = _chunks(tuple(row[-1] for row in pointers), settings["chunk"], device)
        _kernel[(len(chunks),)](
            table_ptr=table.to(device, non_blocking=True),
            chunks_ptr=chunks,
            grad_scale_ptr=grad_scale,
            param_like_ptr=rows[0][0],
            grad_like_ptr=rows[0][1],
            decay=1.0 - lr * weight_decay,
            step_size=lr / (1.0 - beta1**step),
            eps=eps,
            one_minus_beta1=1.0 - beta1,
            beta2=beta2,
            one_minus_beta2=1.0 - beta2,
            bias_correction2_sqrt=(1.0 - beta2**step) ** 0.5,
            one_minus_ema_decay=1.0 - ema_decay,
            SCALED=grad_scale is not None,
            COPY=dtype != torch.float32,
            ALIGNED=aligned,
            CHUNK=settings["chunk"],
            BLOCK=settings["elements"],
            num_warps=settings["warps"],
        )


@adamw_ema_op.register_fake
def _(*arguments: Any) -> None:
    return None


counts_no_flops("adamw_ema")


class AdamWEMA(torch.optim.Optimizer):
    """torch.optim.AdamW with an exponential moving average of the weights.

    State of each parameter: `master` (only if the parameter is not fp32), `exp_avg`, `exp_avg_sq`
    and `ema`, all fp32, and `step` (int).

    Args:
        params: tensors or parameter groups; fp32, bf16 or fp16.
        lr: learning rate.
        betas: decay rates of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        ema_decay: decay rate of the EMA, which may change between steps; 0 disables the EMA.

    Attributes:
        grad_scale: None or a 0-dimensional fp32 tensor on the device: gradients are multiplied by
            it, and `step` changes no tensor if it is negative or NaN. It clips gradients or skips a
            step without a sync.

    Raises:
        ValueError: if a hyperparameter is out of range.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8, weight_decay: float = 0.0, ema_decay: float = 0.999,
    ) -> None:  # fmt: skip
        if lr < 0 or eps <= 0 or weight_decay < 0:
            raise ValueError(
                f"AdamWEMA: lr and weight_decay must be at least 0 and eps above 0, "
                f"got lr={lr}, weight_decay={weight_decay}, eps={eps}"
            )
        rates = {"betas[0]": betas[0], "betas[1]": betas[1], "ema_decay": ema_decay}
        for name, value in rates.items():
            if not 0 <= value < 1:
                raise ValueError(f"AdamWEMA: {name} must be in [0, 1), got {value}")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ema_decay=ema_decay)
        super().__init__(params, defaults)
        self.grad_scale: Tensor | None = None

    def master(self, param: Tensor) -> Tensor:
        """Return the fp32 weights of `param`: its master, or itself if it is fp32."""
        return param if param.dtype == torch.float32 else self._state(param)["master"]

    def ema(self, param: Tensor) -> Tensor:
        """Return the fp32 EMA of `param`."""
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
        """Load the state in fp32; torch alone would cast it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        indices = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(indices, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][key] = value.to(param.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "AdamWEMA does not support closures"
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                self._state(param)["step"] += 1
            self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update the parameters of one group, all of which have a gradient."""
        # One launch for equal steps: a parameter without a gradient at some step lags behind.
        for step in sorted({self.state[param]["step"] for param in params}):
            same_step = [param for param in params if self.state[param]["step"] == step]
            states = [self.state[param] for param in same_step]
            lists = (
                same_step,
                [param.grad for param in same_step if param.grad is not None],
                [self.master(param) for param in same_step],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["ema"] for state in states],
            )
            rates = {name: group[name] for name in ("lr", "eps", "weight_decay", "ema_decay")}
            rates["grad_scale"] = self.grad_scale
            if select_backend("AdamWEMA", same_step[0], _unsupported(*lists)) == "triton":
                beta1, beta2 = group["betas"]
                adamw_ema_op(*lists, step=step, beta1=beta1, beta2=beta2, **rates)
            else:
                adamw_ema_reference(*lists, step=step, betas=group["betas"], **rates)


def _unsupported(params: list[Tensor], grads: list[Tensor], *state: list[Tensor]) -> str | None:
    """Return why the kernel cannot update these parameters, or None if it can."""
    if not all(tensor.is_contiguous() for tensors in (params, *state) for tensor in tensors):
        return "a parameter or its state is not contiguous"
    if any(tensor.device != params[0].device for tensor in (*params, *grads)):
        return "the parameters of a group are on several devices"
    return None
