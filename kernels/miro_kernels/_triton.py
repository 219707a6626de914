"""Triton where it is installed, the launch target, and the private names of torch and triton.

Some platforms have no Triton wheel, and `import miro_kernels` must still work there for the torch
path: the decorator `jit` below returns the function unchanged without Triton. Private or
undocumented names of torch and triton are used in this module only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

AVAILABLE = importlib.util.find_spec("triton") is not None
if TYPE_CHECKING or AVAILABLE:
    import triton
    import triton.language as tl
    from triton import knobs

    INTERPRETING = knobs.runtime.interpret
    """Whether TRITON_INTERPRET was set when Triton was imported: kernels then run on the CPU."""
else:
    triton = tl = None
    INTERPRETING = False
if INTERPRETING:
    # As it comes, the interpreter multiplies the bits of bf16 numbers, and says nothing.
    from miro_kernels.lab.interpreter import patch_interpreter

    patch_interpreter()

# torch's multi-tensor functions, on which the foreach implementations of torch.optim are built.
_FOREACH = ("add_", "addcdiv_", "addcmul_", "div_", "lerp_", "mul", "mul_", "sqrt")
foreach = SimpleNamespace(**{name: getattr(torch, f"_foreach_{name}") for name in _FOREACH})


def jit(function: Callable[..., Any]) -> Any:
    """Decorate with `triton.jit`, or return the function unchanged without Triton."""
    return triton.jit(function) if AVAILABLE else function


def jit_unspecialized(*arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate as `jit`, but do not specialize the integers `arguments`.

    Triton recompiles when an integer argument becomes 1 or a multiple of 16; do not where it
    changes from step to step.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(do_not_specialize=arguments)(function) if AVAILABLE else function

    return decorate


class Target(NamedTuple):
    """The device that launches are compiled for."""

    backend: str
    """cuda or hip."""
    arch: int | str
    """Compute capability times ten, or a gfx name."""

    @property
    def family(self) -> str:
        """The row of the table of tiles: sm_80, sm_90, sm_100 or gfx942."""
        if self.backend == "hip":
            return "gfx942"
        # 12.x is sold as Blackwell, but has the shared memory and registers of 8.x.
        major = int(self.arch) // 10
        return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


INTERPRETED = Target("cuda", 90)
"""The target whose tiles are used under the interpreter, which has no device."""


def target() -> Target:
    """Return the target of this process's launches."""
    if INTERPRETING:
        return INTERPRETED
    active: Any = triton.runtime.driver.active.get_current_target()
    return Target(active.backend, active.arch)


def power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least `number` and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def counts_no_flops(*names: str) -> None:
    """Register the miro ops `names` in torch's FLOP counter, which counts elementwise ops as 0."""
    for name in names:
        register_flop_formula(getattr(torch.ops.miro, name))(lambda *shapes, **out: 0)


@jit
def reduce_rows(
    partials_ptr, sum_ptr, group, part, n_partials, columns,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the fp32 partials (G, P, PARTS, WIDTH) of one group and part over P, in a fixed order.

    Store the sums of `columns` at sum_ptr, which points at the row of that group and part, and
    return them in fp32.
    """
    col_mask = columns < WIDTH
    total = tl.zeros(columns.shape, tl.float32)
    for first in range(0, n_partials, ROWS):
        row = first + tl.arange(0, ROWS)
        offsets = (group.to(tl.int64) * n_partials + row) * PARTS + part
        offsets = offsets[:, None] * WIDTH + columns[None, :]
        mask = (row < n_partials)[:, None] & col_mask[None, :]
        total += tl.sum(tl.load(partials_ptr + offsets, mask=mask, other=0.0), 0)
    tl.store(sum_ptr + columns, total.to(sum_ptr.dtype.element_ty), mask=col_mask)
    return total
