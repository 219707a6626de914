"""One transformer block: attention over image and text, then a SwiGLU MLP, both modulated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miro_kernels import attention, qk_norm_rope, swiglu
from miro_kernels.qk_norm_rope import rms_norm_reference


class Attention(nn.Module):
    """Self-attention of image tokens with the text's keys and values beside their own."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        size = channels // heads
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.text_kv = nn.Linear(channels, 2 * channels, bias=False)
        self.q_norm = nn.Parameter(torch.ones(size))
        self.k_norm = nn.Parameter(torch.ones(size))
        self.text_k_norm = nn.Parameter(torch.ones(size))
        self.out = nn.Linear(channels, channels, bias=False)

    def text(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) text states to keys and values, each (T, heads, head size)."""
        k, v = self.text_kv(states).unflatten(-1, (2, self.heads, -1)).unbind(1)
        return rms_norm_reference(k, self.text_k_norm).to(v.dtype), v

    def forward(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor],
        offsets: Tensor,
        longest: int,
    ) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = qk_norm_rope(q, k, self.q_norm, self.k_norm, *rope)
        return self.out(attention(q, k, v, *text, offsets, longest).flatten(2))


class SwiGLU(nn.Module):
    """(B, N, D) to (B, N, D) through a gated hidden layer."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(swiglu(self.up(h)))


class Block(nn.Module):
    """The two branches of a block; the transformer owns the norms and gates between them."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(channels, heads)
        self.mlp = SwiGLU(channels, hidden)
