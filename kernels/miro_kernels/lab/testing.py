"""The one comparison of a kernel with its reference.

The reference runs twice: on fp64 copies of the arguments, which is the oracle, and on the arguments
themselves, which is eager. For the output and every gradient the kernel's largest error against the
oracle must be at most twice eager's, plus a floor that depends on the dtype of the result alone:

    fp32         8 units in the last place of the oracle's largest value
    bf16, fp16   half a unit, the error of rounding once

since eager's error may happen to be zero, and fp32 sums depend on their order. Where the oracle is
NaN the kernel must be; where eager is finite the kernel must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    wrong: str = ""  # what no error can express: a shape, a dtype, a NaN

    @property
    def over_eager(self) -> float:
        """The kernel's error over eager's, at most BAR where the kernel is right."""
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
    """A gradient for the output of that number: normal, the same every time."""
    generator = torch.Generator().manual_seed(1000 + number)
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return values.to(output.device, output.dtype)


def transposed_gradient(output: Tensor, number: int) -> Tensor:
    """`random_gradient` with its first two dimensions swapped in memory."""
    return random_gradient(output, number).transpose(0, 1).contiguous().transpose(0, 1)


Gradient = Callable[[Tensor, int], Tensor]


def _outputs(result: Any) -> list[Tensor]:
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
        gradient: makes the gradient of each output; None leaves gradients out.
        dtype: widen every floating argument, and the gradients of the outputs, to this.
    """
    leaves: dict[str, Tensor] = {}
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # The strides stay those of the caller: a view of a packed projection, say.
            leaf = value.detach() if dtype is None else value.detach().to(dtype)
            if value.requires_grad and gradient is not None:
                leaves[name] = leaf = leaf.requires_grad_()
            given[name] = leaf
        else:
            given[name] = value
    outputs = _outputs(op(**given))
    results = {
        "output" if len(outputs) == 1 else f"output {n}": out for n, out in enumerate(outputs)
    }
    if gradient is not None and leaves:
        # Eager's dtype decides what values the gradients have, so that all paths get the same.
        low = next(v.dtype for v in arguments.values() if isinstance(v, Tensor))
        flows = [
            gradient(output.detach().to(low), n).to(output.dtype)
            for n, output in enumerate(outputs)
        ]
        found = torch.autograd.grad(outputs, list(leaves.values()), flows, allow_unused=True)
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
    """The errors of op and of its reference, both taking `arguments` by keyword.

    Floating arguments that require gradients are differentiated; the first argument is a tensor
    whose dtype the outputs have.
    """
    kernel = evaluate(op, arguments, gradient=gradient)
    eager = evaluate(reference, arguments, gradient=gradient)
    oracle = evaluate(reference, arguments, gradient=gradient, dtype=torch.float64)
    return [_compared(name, kernel[name], eager[name], oracle[name]) for name in oracle]


def _compared(name: str, kernel: Tensor, eager: Tensor, oracle: Tensor) -> Comparison:
    if kernel.shape != eager.shape or kernel.dtype != eager.dtype:
        wrong = f"{kernel.dtype} {tuple(kernel.shape)}, eager {eager.dtype} {tuple(eager.shape)}"
        return Comparison(name, float("inf"), 0.0, 0.0, wrong)
    undefined = oracle.isnan()
    finite = eager.isfinite() & ~undefined
    for wrong, where in (
        ("not NaN where the oracle is", undefined & ~kernel.isnan()),
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
    """Raise AssertionError with every output and gradient that is too far from the oracle."""
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
    """Raise AssertionError unless two runs give every output and gradient bit for bit."""
    first, second = (evaluate(op, arguments, gradient=gradient) for _ in range(2))
    different = [name for name in first if not _same_bits(first[name], second[name])]
    if different:
        raise AssertionError(f"two runs differ in {', '.join(different)}")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def requiring_gradients(arguments: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The arguments, those named marked for differentiation in place."""
    for name in names:
        arguments[name].requires_grad_()
    return arguments
