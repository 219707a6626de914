"""Transformer blocks of the image tokens (adaLN-modulated) and of the text tokens."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miro_kernels import attention, qk_norm_rope, reward_adaln, swiglu
from miro_kernels.qk_norm_rope import rms_norm_reference


class TextKV(NamedTuple):
    """Keys and values of a batch of packed texts, for the attention of one block."""

    k: Tensor  # (T, heads, head size)
    v: Tensor  # (T, heads, head size)
    offsets: Tensor  # (B + 1,) int32: text b is k[offsets[b] : offsets[b + 1]]
    longest: int


class Modulation(NamedTuple):
    """Gate, shift and scale of one adaLN, as the terms that the fused kernel sums.

        (gate, shift, scale)[b] = shared[b] + offset + Σ_r keep[b, r] · table[r, bins[b, r]]

    `shared` comes from time and text, `offset` is this adaLN's own parameter, `table` holds what
    reward r adds at each quantile level: adaLN-single (PixArt-α, arXiv 2310.00426) with
    rewards added. The sum is never materialized.
    """

    shared: Tensor  # (B, 3, D)
    offset: Tensor  # (3, D)
    table: Tensor  # (R, L, 3, D)
    bins: Tensor  # (B, R) integers in [0, L)
    keep: Tensor  # (B, R) bool


def modulated_norm(x: Tensor, mod: Modulation) -> Tensor:
    """AdaLN: h = (1 + scale) · LN(x) + shift, (B, N, D)."""
    shared, offset, table = mod.shared[:, 1:], mod.offset[1:], mod.table[:, :, 1:]
    return cast("Tensor", reward_adaln(x, shared, offset, table, mod.bins, mod.keep))


def gated_residual_norm(x: Tensor, branch: Tensor, mod: Modulation) -> tuple[Tensor, Tensor]:
    """Residual and adaLN: x′ = x + gate · branch, h = (1 + scale) · LN(x′) + shift."""
    out = reward_adaln(x, mod.shared, mod.offset, mod.table, mod.bins, mod.keep, branch=branch)
    return cast("tuple[Tensor, Tensor]", out)


class TextProjection(nn.Module):
    """(T, D) text tokens to keys and values, each (T, heads, head size).

    A module of its own because `encode_context` calls it long before the attention that uses it:
    ZeRO-3 gathers parameters in a module's pre-forward hook and frees them in its post-forward one.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(channels, 2 * channels, bias=False)
        self.k_norm = nn.Parameter(torch.ones(channels // heads))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """RMS-normed keys, and values."""
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(1)
        return rms_norm_reference(k, self.k_norm).to(v.dtype), v


class Attention(nn.Module):
    """Attention of image tokens over the image's and the text's tokens, in one softmax."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        head_size = channels // heads
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.text = TextProjection(channels, heads)
        self.q_norm = nn.Parameter(torch.ones(head_size))
        self.k_norm = nn.Parameter(torch.ones(head_size))
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, h: Tensor, context: TextKV, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) to (B, N, D); `rope` is cos and sin, each (N, head size / 2)."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = qk_norm_rope(q, k, self.q_norm, self.k_norm, *rope)
        return self.out(attention(q, k, v, *context).flatten(2))


class SwiGLU(nn.Module):
    """Feed-forward layer silu(a) · b, (B, N, D) to (B, N, D) (arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Up-projection, gate, down-projection."""
        return self.down(swiglu(self.up(h)))


class Block(nn.Module):
    """Attention and SwiGLU branches, each added to the residual stream and followed by an adaLN.

    The adaLN in front of a branch is fused with the residual addition of the branch before it, so
    a block receives its attention's input already normed and returns the next block's.
    """

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(channels, heads)
        self.mlp = SwiGLU(channels, hidden)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        modulation: tuple[Modulation, Modulation],
        context: TextKV,
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Apply both branches.

        Args:
            x: (B, N, D) residual stream.
            h: (B, N, D) modulated norm of x, the input of the attention.
            modulation: of the adaLN before the MLP, and of the one after it.
            context: keys and values of the text.
            rope: cos and sin of the image tokens' positions.

        Returns:
            x and h for the next block, or for the output layer.
        """
        before_mlp, after_mlp = modulation
        x, h = gated_residual_norm(x, self.attention(h, context, rope), before_mlp)
        return gated_residual_norm(x, self.mlp(h), after_mlp)


class TextBlock(nn.Module):
    """Pre-norm self-attention within each text, then a SwiGLU.

    The states of a frozen encoder separate "a frog left of a fish" from "a fish left of a frog"
    only weakly; these trained blocks let each token take up its role in the relation.
    """

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(channels), nn.RMSNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.mlp = SwiGLU(channels, hidden)

    def forward(self, tokens: Tensor, padded_index: Tensor, mask: Tensor) -> Tensor:
        """(T, D) packed tokens to (T, D).

        Args:
            tokens: the texts of the batch, packed.
            padded_index: (T,) index of each token in the padded (B · longest) layout.
            mask: (B, longest) bool, True where the padded layout holds a token.
        """
        batch, longest = mask.shape
        qkv = self.qkv(self.attention_norm(tokens))
        # SDPA needs a padded batch; all else here is computed on packed tokens.
        padded = qkv.new_zeros(batch * longest, qkv.shape[1]).index_copy(0, padded_index, qkv)
        if padded.device.type == "cpu":
            # SDPA's backward on a CPU is much slower in bf16 than in fp32.
            padded = padded.float()
        head_size = tokens.shape[1] // self.heads
        q, k, v = padded.view(batch, longest, 3, self.heads, head_size).permute(2, 0, 3, 1, 4)
        # A fully masked row gives NaN in SDPA: unmask the zero padding, the output is discarded.
        mask = mask | ~mask.any(1, keepdim=True)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)[padded_index]
        tokens = tokens + self.out(attended.to(tokens.dtype))
        return tokens + self.mlp(self.mlp_norm(tokens))
