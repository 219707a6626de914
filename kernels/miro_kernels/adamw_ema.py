"""AdamW, the moving average of the weights and the low-precision copy, as one optimizer.

    m ← β₁·m + (1 − β₁)·g            v ← β₂·v + (1 − β₂)·g²
    w ← w·(1 − lr·λ) − lr·m̂ / (sqrt(v̂) + ε)          m̂, v̂: m and v without their bias to zero
    e ← e + (1 − d)·(w − e)           p ← w in the parameter's dtype

w is the fp32 master of the parameter p (p itself where p is fp32), e the average that sampling
uses. e and w are optimizer state, so that whatever shards or saves the optimizer shards and saves
them. Source: AdamW, arXiv 1711.05101.

The kernel reads g, w, m, v, e and writes w, m, v, e, p once: 36 bytes a bf16 parameter, the least
possible. One launch updates all parameters of a group that share their dtypes: a table in device
memory says where each one's tensors are. It is written anew at each step, some kilobytes through
pinned memory that nothing waits for, since gradients are; so no pointer can be stale. Step and
rates are numbers of the launch: nothing waits for the device.

What clips gradients, or skips a step that would hurt, is a number on the device that the kernel
reads: g is multiplied by it on its way, and a number below 0 (or NaN) leaves everything as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from miro_kernels._triton import ceil_div, counts_no_flops, jit, tl
from miro_kernels.backend import select_backend
from miro_kernels.tiles import tile


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
    grad_scale: Tensor | None = None,
) -> None:
    """One step in place, over lists of tensors; everything but params and grads is fp32.

    grad_scale: a number g is multiplied by; below 0 or NaN, nothing changes. It is read here, so
    that a GPU is waited for.
    """
    wide = [grad.float() for grad in grads]
    if grad_scale is not None:
        scale = grad_scale.item()
        if not scale >= 0:
            return
        if scale != 1:
            wide = list(torch._foreach_mul(wide, scale))
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


@jit
def _kernel(
    table_ptr, chunks_ptr, scale_ptr, param_like_ptr, grad_like_ptr, keep_weight, rate, eps,
    grad_share, keep_square, square_share, root, ema_share,
    SCALED: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """CHUNK elements of one parameter; param_like_ptr and grad_like_ptr only say their dtypes."""
    row = table_ptr + tl.load(chunks_ptr + 2 * tl.program_id(0)) * 7
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1) * CHUNK
    param_ptr = tl.load(row).to(param_like_ptr.dtype)
    grad_ptr = tl.load(row + 1).to(grad_like_ptr.dtype)
    weight_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    mean_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    square_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    ema_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 6)
    if ALIGNED:
        # What Triton knows of pointers that are arguments it must be told of those from memory.
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        weight_ptr, mean_ptr = tl.multiple_of(weight_ptr, 16), tl.multiple_of(mean_ptr, 16)
        square_ptr, ema_ptr = tl.multiple_of(square_ptr, 16), tl.multiple_of(ema_ptr, 16)
        size = tl.multiple_of(size, 16)
    count = tl.minimum(CHUNK, size - first)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr)
        # A step to skip, NaN included, has nothing to do.
        count = tl.where(scale >= 0, count, 0)
    for start in range(0, count, BLOCK):
        place = first + start + tl.arange(0, BLOCK)
        mask = place < size
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32) * scale
        weight = tl.load(weight_ptr + place, mask=mask, other=0.0)
        mean = tl.load(mean_ptr + place, mask=mask, other=0.0)
        square = tl.load(square_ptr + place, mask=mask, other=0.0)
        ema = tl.load(ema_ptr + place, mask=mask, other=0.0)
        mean += grad_share * (grad - mean)
        square = keep_square * square + square_share * grad * grad
        weight = weight * keep_weight - rate * (mean / (tl.sqrt(square) / root + eps))
        # As torch.lerp: exactly the weight where its share is 1.
        change = weight - ema
        ema = tl.where(ema_share < 0.5, ema + ema_share * change, weight - change * (1 - ema_share))
        tl.store(weight_ptr + place, weight, mask=mask)
        tl.store(mean_ptr + place, mean, mask=mask)
        tl.store(square_ptr + place, square, mask=mask)
        tl.store(ema_ptr + place, ema, mask=mask)
        if COPY:
            tl.store(param_ptr + place, weight.to(param_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """(programs, 2) int64: the row of the table and the chunk of the parameter of each program."""
    pairs = [(row, n) for row, size in enumerate(sizes) for n in range(ceil_div(size, chunk))]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(device)


@torch.library.custom_op(
    "miro::adamw_ema", mutates_args=("params", "masters", "exp_avgs", "exp_avg_sqs", "emas")
)
def _adamw_ema(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    grad_scale: Tensor | None = None,
) -> None:
    """The reference's step, in one launch for all parameters whose dtypes and alignment agree."""
    alike: dict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)
    for tensors in zip(params, grads, masters, exp_avgs, exp_avg_sqs, emas, strict=True):
        tensors = (tensors[0], tensors[1].contiguous(), *tensors[2:])
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors) and tensors[0].numel() % 16 == 0
        alike[tensors[0].dtype, tensors[1].dtype, aligned].append(tensors)
    settings = tile("adamw_ema")
    for (dtype, _, aligned), rows in alike.items():
        device = rows[0][0].device
        pointers = [[*(t.data_ptr() for t in tensors), tensors[0].numel()] for tensors in rows]
        table = torch.tensor(pointers, dtype=torch.int64, pin_memory=device.type == "cuda")
        chunks = _chunks(tuple(row[-1] for row in pointers), settings["chunk"], device)
        _kernel[(len(chunks),)](
            table_ptr=table.to(device, non_blocking=True),
            chunks_ptr=chunks,
            scale_ptr=grad_scale,
            param_like_ptr=rows[0][0],
            grad_like_ptr=rows[0][1],
            keep_weight=1.0 - lr * weight_decay,
            rate=lr / (1.0 - beta1**step),
            eps=eps,
            grad_share=1.0 - beta1,
            keep_square=beta2,
            square_share=1.0 - beta2,
            root=(1.0 - beta2**step) ** 0.5,
            ema_share=1.0 - ema_decay,
            SCALED=grad_scale is not None,
            COPY=dtype != torch.float32,
            ALIGNED=aligned,
            CHUNK=settings["chunk"],
            BLOCK=settings["elements"],
            num_warps=settings["warps"],
        )


@_adamw_ema.register_fake
def _(*arguments: Any) -> None:
    return None


counts_no_flops("adamw_ema")


class AdamWEMA(torch.optim.Optimizer):
    """torch.optim.AdamW that also keeps an exponential moving average of the weights.

    Args:
        params: tensors or groups, as every torch optimizer takes them; fp32, bf16 or fp16.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        ema_decay: d above; a group's value may be changed between steps. 0 keeps no average.

    `grad_scale`, if set, is a number on the device (fp32, of no dimension) that gradients are
    multiplied by; below 0 or NaN, `step` changes no tensor. It is for clipping, and for skipping a
    step, without waiting for the device.

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
        self.grad_scale: Tensor | None = None

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
            lists = (
                chosen,
                [param.grad for param in chosen if param.grad is not None],
                [self.master(param) for param in chosen],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["ema"] for state in states],
            )
            rates = {name: group[name] for name in ("lr", "eps", "weight_decay", "ema_decay")}
            rates["grad_scale"] = self.grad_scale
            if select_backend("AdamWEMA", chosen[0], _unsupported(*lists)) == "triton":
                beta1, beta2 = group["betas"]
                _adamw_ema(*lists, step=step, beta1=beta1, beta2=beta2, **rates)
            else:
                adamw_ema_reference(*lists, step=step, betas=group["betas"], **rates)


def _unsupported(params: list[Tensor], grads: list[Tensor], *state: list[Tensor]) -> str | None:
    """Why the kernel cannot update these parameters, or None where it can."""
    if not all(tensor.is_contiguous() for tensors in (params, *state) for tensor in tensors):
        return "a parameter or its state is not contiguous"
    if any(tensor.device != params[0].device for tensor in (*params, *grads)):
        return "the parameters of a group are on several devices"
    return None
