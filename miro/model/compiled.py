"""CompiledModel: the training forward, eager or under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, RewardCond


class CompiledModel(nn.Module):
    """The network with its text projection as one call, the unit of torch.compile.

    With `regional_compile` (chosen on a CPU) one block is compiled and reused for all, and the
    partitioner may recompute tensors that no matrix product made instead of saving them, which
    lowers peak memory. Neither was measured on a GPU, where norms and activations are opaque
    kernels anyway.
    """

    def __init__(self, model: FlowTransformer, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.run: Callable[..., Tensor] = self._predict
        if compiled:
            self.run = torch.compile(self._predict, dynamic=True)
        self.patched = compiled and model.regional_compile
        # The last block's residual output is unused, so its backward graph differs; silence
        # torch's warning about that.
        warnings.filterwarnings("ignore", "invoke_subgraph traced multiple backward graphs")

    def forward(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: PackedText) -> Tensor:
        """Predict from x_t (B, C, H, W) and t (B,); returns fp32 (B, C, H, W)."""
        if not self.patched:
            return self.run(x_t, t, rewards, text)
        # Any call may recompile, so patch at each one. nested_compile_region needs eps to be a
        # constant (specialize_float).
        with (
            dynamo_config.patch(specialize_float=True),
            functorch_config.patch(ban_recompute_materialized_backward=False),
        ):
            return self.run(x_t, t, rewards, text)

    def _predict(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: PackedText) -> Tensor:
        return self.model(x_t, t, rewards, self.model.encode_context(text))
