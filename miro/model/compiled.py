"""The one call that is trained, as it is or compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, RewardCond
from miro.utils.torch_internals import dynamo_config, functorch_config


class CompiledModel(nn.Module):
    """The network from noise and conditions to the prediction, as the one call that is trained.

    Compiled on a CPU, one block is translated for all, which takes less time and leaves less of the
    compiler in memory; and what no product made is computed again in backward instead of kept. On a
    GPU neither was measured, and the second has little to save: norms and activation are kernels
    there, which the compiler takes as they are.
    """

    def __init__(self, model: FlowTransformer, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.run: Callable[..., Tensor] = self._predict
        if compiled:
            self.run = torch.compile(self._predict, dynamic=True)
        on_cpu = model.patches.weight.device.type == "cpu"
        self.compiled_on_cpu = model.regional_compile = compiled and on_cpu
        # No one reads the residual stream behind the last block, whose backward is another for it.
        warnings.filterwarnings("ignore", "invoke_subgraph traced multiple backward graphs")

    def forward(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: PackedText) -> Tensor:
        if not self.compiled_on_cpu:
            return self.run(x_t, t, rewards, text)
        # At every call, as any may translate. A block's region cannot take an eps that varies.
        with (
            dynamo_config.patch(specialize_float=True),
            functorch_config.patch(ban_recompute_materialized_backward=False),
        ):
            return self.run(x_t, t, rewards, text)

    def _predict(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: PackedText) -> Tensor:
        return self.model(x_t, t, rewards, self.model.encode_context(text))
