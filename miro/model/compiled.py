"""CompiledModel: the network's training forward pass, eager or under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, RewardCond
from miro.utils.torch_internals import dynamo_config, functorch_config


class CompiledModel(nn.Module):
    """Text encoding and prediction as one call, which DeepSpeed wraps and torch.compile compiles.

    With `model.regional_compile` (the trainer's choice on a CPU) one block is compiled for all,
    which takes less time and memory, and backward recomputes everything but matmul outputs. On a
    GPU norms and activations are Triton kernels already, so neither would save much there.
    """

    def __init__(self, model: FlowTransformer, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.run: Callable[..., Tensor] = self._predict
        if compiled:
            self.run = torch.compile(self._predict, dynamic=True)
        self.regional = compiled and model.regional_compile
        # The last block's residual output is unused, so its backward graph differs from the others.
        warnings.filterwarnings("ignore", "invoke_subgraph traced multiple backward graphs")

    def forward(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: PackedText) -> Tensor:
        """The network's fp32 prediction, (B, C, H, W)."""
        if not self.regional:
            return self.run(x_t, t, rewards, text)
        # Any call may recompile, so patch at each one. `nested_compile_region` needs `eps` to be a
        # constant (`specialize_float`).
        with (
            dynamo_config.patch(specialize_float=True),
            functorch_config.patch(ban_recompute_materialized_backward=False),
        ):
            return self.run(x_t, t, rewards, text)

    def _predict(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: PackedText) -> Tensor:
        return self.model(x_t, t, rewards, self.model.encode_context(text))
