"""Bytes moved by torch's own operations: those of eager mode, and those of a kernel's launcher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from miro_kernels.lab.private_torch import (
    DispatchKey,
    DispatchKeySet,
    TorchDispatchMode,
    tree_leaves,
)

FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty",
    "empty_like", "empty_strided", "expand", "new_empty", "new_empty_strided", "permute", "reshape",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
}  # fmt: skip
"""Operations that move nothing: views and uninitialized allocations."""
OVERWRITING = {"copy_", "fill_", "zero_"}
"""In-place operations that do not read the tensor they write."""


class EagerBytes(TorchDispatchMode):
    """Counts each operation's inputs as read once and its outputs as written once.

    There is no cache model, and an operation of several kernels counts as one, so the count is a
    lower bound. For an op of miro_kernels, the torch operations of its launcher are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "miro":
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if name not in FREE:
            inputs = _tensors((args, kwargs))
            mutated = _tensors(
                [
                    value
                    for value, argument in zip(args, func._schema.arguments, strict=False)
                    if argument.alias_info is not None and argument.alias_info.is_write
                ]
            )
            if name in OVERWRITING:
                inputs = {key: t for key, t in inputs.items() if key not in mutated}
            self.bytes += size(*inputs.values())
            self.bytes += size(*(mutated | _tensors(result)).values())
        return result


def _tensors(values: Any) -> dict[Any, Tensor]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}


def eager_bytes(run: Callable[[], Any]) -> int:
    """The bytes that run() moves in eager mode."""
    with EagerBytes() as counter:
        run()
    return counter.bytes


def size(*tensors: Tensor) -> int:
    """Bytes of the tensors' elements in memory; an expanded dimension counts once."""
    total = 0
    for tensor in tensors:
        dims = zip(tensor.shape, tensor.stride(), strict=True)
        total += math.prod(n for n, stride in dims if stride or not n) * tensor.element_size()
    return total
