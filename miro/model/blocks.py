"""Transformer blocks: attention over image and text tokens, SwiGLU, adaLN modulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miro_kernels import attention, qk_norm_rope, reward_adaln, swiglu
from miro_kernels.qk_norm_rope import rms_norm_reference

ATTENTION, MLP = 0, 1
"""Kinds of norms: before an attention (and before the output), and before an MLP."""


class Modulation(NamedTuple):
    """adaLN modulation: gate of the branch before a norm, and shift and scale of the norm.

    Each is base + offset + Σ_r keep_r · table[r, bin_r], summed inside `reward_adaln`. Tensors of
    `base` and `table` are per kind of norm.
    """

    base: Sequence[Tensor]  # (B, 3, D), shared by all blocks, from time and text
    table: Sequence[Tensor]  # (R, L, 3, D)
    bins: Tensor  # (B, R)
    keep: Tensor  # (B, R) bool
    offsets: tuple[Tensor, ...] = ()  # (3, D) each: of a block's MLP norm, and of the next norm

    def norm(
        self, kind: int, offset: Tensor, x: Tensor, branch: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return x + gate · branch (or x, without a branch), and its modulated layer norm."""
        base, table = self.base[kind], self.table[kind]
        if branch is None:  # no gate
            base, offset, table = base[:, 1:], offset[1:], table[:, :, 1:]
        out = reward_adaln(x, base, offset, table, self.bins, self.keep, branch=branch)
        return out if isinstance(out, tuple) else (x, out)


class BlockContext(NamedTuple):
    """What attention of a block needs beside its input."""

    rope: tuple[Tensor, Tensor]  # cos and sin of the image tokens
    text_k: Tensor  # (T, heads, head size)
    text_v: Tensor
    text_offsets: Tensor  # (B + 1,) int32
    longest: int


class TextProjection(nn.Module):
    """Project text states (T, D) to keys and values, each (T, heads, head size).

    A module of its own because ZeRO-3 gathers weights at a module's forward and releases them at
    its end, and text is projected long before the attention that uses it.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(channels, 2 * channels, bias=False)
        self.k_norm = nn.Parameter(torch.ones(channels // heads))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the RMS-normed keys and the values."""
        k, v = self.kv(states).unflatten(-1, (2, self.heads, -1)).unbind(1)
        return rms_norm_reference(k, self.k_norm).to(v.dtype), v


class Attention(nn.Module):
    """Attention of image tokens over themselves and the text tokens of their sample."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        size = channels // heads
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.text = TextProjection(channels, heads)
        self.q_norm = nn.Parameter(torch.ones(size))
        self.k_norm = nn.Parameter(torch.ones(size))
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, h: Tensor, context: BlockContext) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = qk_norm_rope(q, k, self.q_norm, self.k_norm, *context.rope)
        text = context.text_k, context.text_v, context.text_offsets, context.longest
        return self.out(attention(q, k, v, *text).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP: down(silu(a) · b), where [a, b] = up(h)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        return self.down(swiglu(self.up(h)))


class Block(nn.Module):
    """Attention and MLP, each with an adaLN norm before it and a gate behind it."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(channels, heads)
        self.mlp = SwiGLU(channels, hidden)

    def forward(
        self, x: Tensor, h: Tensor, modulation: Modulation, context: BlockContext
    ) -> tuple[Tensor, Tensor]:
        """Advance the residual stream by one block.

        A gate and the norm behind it are one kernel, so a block takes its first norm from the
        block before it and computes that of the next.

        Args:
            x: Residual stream (B, N, D).
            h: Modulated norm of x, the input of attention.
            modulation: With this block's offsets.
            context: RoPE angles and the text's keys and values.

        Returns:
            The residual stream and its modulated norm, both (B, N, D).
        """
        mlp_offset, next_offset = modulation.offsets
        x, h = modulation.norm(MLP, mlp_offset, x, self.attention(h, context))
        return modulation.norm(ATTENTION, next_offset, x, self.mlp(h))


class TextBlock(nn.Module):
    """Self-attention over the tokens of each text, then a SwiGLU MLP; pre-norm, unmodulated.

    The states of a frozen encoder hardly distinguish "a frog left of a fish" from "a fish left of a
    frog"; a trained block can.
    """

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(channels), nn.RMSNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.mlp = SwiGLU(channels, hidden)

    def forward(self, words: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Map packed text states (T, D) to (T, D).

        Args:
            words: The texts of the batch, concatenated.
            positions: Index (T,) of each token in the padded (B · longest) layout.
            mask: (B, longest) bool, True at tokens, False at padding.
        """
        batch, longest = mask.shape
        qkv = self.qkv(self.attention_norm(words))
        # SDPA needs a padded batch; all other tensors of text are packed.
        padded = qkv.new_zeros(batch * longest, qkv.shape[1]).index_copy(0, positions, qkv)
        if padded.device.type == "cpu":
            # SDPA's bf16 backward is much slower than fp32 on a CPU.
            padded = padded.float()
        size = words.shape[1] // self.heads
        q, k, v = padded.view(batch, longest, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        # A fully masked row gives NaN in SDPA: unmask its zero padding, the output is discarded.
        mask = mask | ~mask.any(1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        out = out.transpose(1, 2).flatten(2).flatten(0, 1)[positions]
        words = words + self.out(out.to(words.dtype))
        return words + self.mlp(self.mlp_norm(words))
