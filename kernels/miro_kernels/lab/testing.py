"""Comparison of a kernel with its reference, used by all kernel tests.

The reference runs twice: in fp64 (the oracle) and in the arguments' dtypes (eager). For the output
and every gradient, the kernel's maximum absolute error against the oracle must be at most twice
eager's, plus a floor by dtype, in ulp of the oracle's largest value:

    fp32         8 ulp, since sums depend on their order
    bf16, fp16   0.5 ulp, one rounding, since eager's error may happen to be zero

The kernel must be NaN where the oracle is, and finite where eager is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOORS = {torch.float32: 8.0, torch.bfloat16: 0.5, torch.float16: 0.5}
BAR = 2.0


@dataclass(frozen=True)
class Comparison:
    """The errors of one output or gradient against the oracle."""

    name: str
    kernel: float
    eager: float
    floor: float
    wrong: str = ""  # a mismatch of shape, dtype, NaN or inf

    @property
    def over_eager(self) -> float:
        """The kernel's error over eager's, floor included; at most BAR to pass."""
        allowed = self.eager + self.floor / BAR
        return 0.0 if self.kernel == 0 else self.kernel / allowed if allowed else float("inf")

    def __str__(self) -> str:
        return (
            self.wrong
            and f"{self.name}: {self.wrong}"
            or (
                f"{self.name}: error {self.kernel:.3g} against eager's {self.eager:.3g}, "
                f"floor {self.floor:.3g}: {self.over_eager:.2f} of at most {BAR}"
            )
        )


def random_gradient(output: Tensor, number: int) -> Tensor:
    """A normal gradient for output `number`, from a fixed seed."""
    generator = torch.Generator().manual_seed(1000 + number)
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return values.to(output.device, output.dtype)


def transposed_gradient(output: Tensor, number: int) -> Tensor:
    """`random_gradient` with the strides of its first two dimensions swapped."""
    return random_gradient(output, number).transpose(0, 1).contiguous().transpose(0, 1)


Gradient = Callable[[Tensor, int], Tensor]


def outputs_of(result: Any) -> list[Tensor]:
    """The result of an op as a list of outputs."""
    return list(result) if isinstance(result, tuple | list) else [result]


def evaluate(
    op: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    gradient: Gradient | None = random_gradient,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The outputs of op(**arguments), and the gradients of the arguments that require one.

    Args:
        op: takes `arguments` by keyword.
        arguments: tensors and other values.
        gradient: (output, index) to the gradient of that output; None computes no gradients.
        dtype: cast floating arguments and the gradients of the outputs to this.

    Returns:
        Tensors by name: "output" (or "output 0", ...) and "d <argument>".
    """
    leaves: dict[str, Tensor] = {}
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            leaf = value.detach() if dtype is None else value.detach().to(dtype)
            if value.requires_grad and gradient is not None:
                leaves[name] = leaf = leaf.requires_grad_()
            given[name] = leaf
        else:
            given[name] = value
    outputs = outputs_of(op(**given))
    results = {
        "output" if len(outputs) == 1 else f"output {n}": out for n, out in enumerate(outputs)
    }
    if gradient is not None and leaves:
        # Round to the arguments' dtype, so that the oracle gets the same gradients.
        low_dtype = next(v.dtype for v in arguments.values() if isinstance(v, Tensor))
        output_grads = [
            gradient(output.detach().to(low_dtype), n).to(output.dtype)
            for n, output in enumerate(outputs)
        ]
        found = torch.autograd.grad(outputs, list(leaves.values()), output_grads, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), found, strict=True):
            results[f"d {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: result.detach() for name, result in results.items()}


def compare(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    gradient: Gradient | None = random_gradient,
) -> list[Comparison]:
    """The errors of every output and gradient of `op` and of its reference.

    Both take `arguments` by keyword; the first must be a tensor in the outputs' dtype.
    """
    kernel = evaluate(op, arguments, gradient=gradient)
    eager = evaluate(reference, arguments, gradient=gradient)
    oracle = evaluate(reference, arguments, gradient=gradient, dtype=torch.float64)
    return [_compared(name, kernel[name], eager[name], oracle[name]) for name in oracle]


def _compared(name: str, kernel: Tensor, eager: Tensor, oracle: Tensor) -> Comparison:
    if kernel.shape != eager.shape or kernel.dtype != eager.dtype:
        wrong = f"{kernel.dtype} {tuple(kernel.shape)}, eager {eager.dtype} {tuple(eager.shape)}"
        return Comparison(name, float("inf"), 0.0, 0.0, wrong)
    nan = oracle.isnan()
    finite = eager.isfinite() & ~nan
    for wrong, where in (
        ("not NaN where the oracle is", nan & ~kernel.isnan()),
        ("not finite where eager is", finite & ~kernel.isfinite()),
    ):
        if where.any():
            first = tuple(where.nonzero()[0].tolist())
            text = f"{wrong}, {int(where.sum())} times, first at {first}"
            return Comparison(name, float("inf"), 0.0, 0.0, text)
    if not finite.any():
        return Comparison(name, 0.0, 0.0, 0.0)
    exact = oracle[finite]
    error, eager_error = (float((v[finite].double() - exact).abs().max()) for v in (kernel, eager))
    floor = FLOORS[kernel.dtype] * torch.finfo(kernel.dtype).eps * float(exact.abs().max())
    return Comparison(name, error, eager_error, floor)


def assert_close(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    gradient: Gradient | None = random_gradient,
) -> None:
    """Raise AssertionError that lists the outputs and gradients with too large an error."""
    compared = compare(op, reference, arguments, gradient=gradient)
    bad = [str(c) for c in compared if c.wrong or not c.over_eager <= BAR]
    if bad:
        raise AssertionError("\n".join(bad))


def assert_repeats(
    op: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    gradient: Gradient | None = random_gradient,
) -> None:
    """Raise AssertionError unless two runs give identical bits in every output and gradient."""
    first, second = (evaluate(op, arguments, gradient=gradient) for _ in range(2))
    different = [name for name in first if not _same_bits(first[name], second[name])]
    if different:
        raise AssertionError(f"two runs differ in {', '.join(different)}")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
