"""The bytes that torch's own operations move: what eager costs, and what a launcher adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Views of their input, or uninitialised memory: no bytes are moved.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty",
    "empty_like", "empty_strided", "expand", "new_empty", "new_empty_strided", "permute", "reshape",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view",
}  # fmt: skip
OVERWRITING = {"copy_", "fill_", "zero_"}


class EagerBytes(TorchDispatchMode):
    """Counts, for every operation run inside, its inputs read once and its outputs written once.

    No cache is modelled, and an operation of several kernels counts as one: the count is a lower
    bound of what eager moves. Inside of an op of miro_kernels its own torch operations are counted.
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
            given = _tensors((args, kwargs))
            changed = _tensors(
                [
                    value
                    for value, argument in zip(args, func._schema.arguments, strict=False)
                    if argument.alias_info is not None and argument.alias_info.is_write
                ]
            )
            if name in OVERWRITING:
                given = {key: t for key, t in given.items() if key not in changed}
            self.bytes += sum(map(_size, given.values()))
            self.bytes += sum(map(_size, (changed | _tensors(result)).values()))
        return result


def _tensors(values: Any) -> dict[Any, Tensor]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; what is expanded lies in memory once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n)
    return math.prod(sizes) * tensor.element_size()


def eager_bytes(run: Callable[[], Any]) -> int:
    """The bytes run() moves."""
    with EagerBytes() as counted:
        run()
    return counted.bytes


def size(*tensors: Tensor) -> int:
    """Bytes of tensors, each read or written once."""
    return sum(map(_size, tensors))
