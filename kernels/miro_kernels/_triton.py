"""What all kernels share: Triton where it is installed, the target, tiles, and jit functions.

Triton is absent from some platforms' wheels, and a laptop must still import every op for its torch
path. Kernels are therefore made by `jit` below, which leaves the function alone without Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
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


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit; without Triton the function itself, which nothing then launches."""
    return triton.jit(function) if AVAILABLE else function


def jit_for_any(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """As `jit`, for kernels whose integers `varying` differ from one step to the next.

    Triton compiles anew for a number that is 1 or a multiple of 16; these it takes as they come.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(do_not_specialize=varying)(function) if AVAILABLE else function

    return decorate


class Target(NamedTuple):
    """What a launch is compiled for."""

    backend: str
    """cuda or hip."""
    arch: int | str
    """Compute capability times ten, or the name of a gfx."""

    @property
    def family(self) -> str:
        """The row of the table of tiles: sm_80, sm_90, sm_100 or gfx942."""
        if self.backend == "hip":
            return "gfx942"
        # 12.x is Blackwell in name, but has the shared memory and registers of 8.x.
        major = int(self.arch) // 10
        return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


INTERPRETED = Target("cuda", 90)
"""What launches are shaped for under the interpreter, which has no target of its own."""


def target() -> Target:
    """The target of the launches of this process; the one place that asks Triton for it."""
    if INTERPRETING:
        return INTERPRETED
    active: Any = triton.runtime.driver.active.get_current_target()
    return Target(active.backend, active.arch)


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def counts_no_flops(*ops: Any) -> None:
    """Tell torch's counter that these ops are elementwise, which it counts as nothing anywhere."""
    for op in ops:
        register_flop_formula(getattr(torch.ops.miro, op._name))(lambda *shapes, **out: 0)


@jit
def fold_partials(
    partials_ptr,
    sum_ptr,
    group,
    part,
    n_partials,
    columns,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum (G, P, PARTS, WIDTH) fp32 partials over P at one group and part, always in one order.

    Stores to sum_ptr, which points at the group's and part's row, and returns the fp32 sum.
    """
    inside = columns < WIDTH
    total = tl.zeros(columns.shape, tl.float32)
    for first in range(0, n_partials, ROWS):
        row = first + tl.arange(0, ROWS)
        place = (group.to(tl.int64) * n_partials + row) * PARTS + part
        place = place[:, None] * WIDTH + columns[None, :]
        mask = (row < n_partials)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partials_ptr + place, mask=mask, other=0.0), 0)
    tl.store(sum_ptr + columns, total.to(sum_ptr.dtype.element_ty), mask=inside)
    return total
