"""Blocks of the transformer: attention over image and text, then a SwiGLU MLP.

Those of the image are modulated by the transformer; those of the text come before, and are not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miro_kernels import attention, qk_norm_rope, swiglu
from miro_kernels.qk_norm_rope import rms_norm_reference


class TextProjection(nn.Module):
    """(T, D) text states to keys and values, each (T, heads, head size).

    Called long before the attention it belongs to, so a module of its own: ZeRO gathers weights
    where a module begins and lets go of them where it ends.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(channels, 2 * channels, bias=False)
        self.k_norm = nn.Parameter(torch.ones(channels // heads))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(states).unflatten(-1, (2, self.heads, -1)).unbind(1)
        return rms_norm_reference(k, self.k_norm).to(v.dtype), v


class Attention(nn.Module):
    """Self-attention of image tokens with the text's keys and values beside their own."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        size = channels // heads
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.text = TextProjection(channels, heads)
        self.q_norm = nn.Parameter(torch.ones(size))
        self.k_norm = nn.Parameter(torch.ones(size))
        self.out = nn.Linear(channels, channels, bias=False)

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


class TextBlock(nn.Module):
    """Words of one text read one another, then a SwiGLU MLP.

    A frozen encoder's states tell "a frog left of a fish" from "a fish left of a frog" only
    faintly. Here "frog" can learn to say which end of the relation it is.
    """

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(channels), nn.RMSNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.mlp = SwiGLU(channels, hidden)

    def forward(self, words: Tensor, places: Tensor, present: Tensor) -> Tensor:
        """(T, D) words end to end to the same.

        Args:
            words: the texts of the batch.
            places: (T,) where each word lies in the padded (B · longest) layout.
            present: (B, longest) bool, which places of that layout hold a word.
        """
        batch, longest = present.shape
        qkv = self.qkv(self.attention_norm(words))
        # Attention wants a rectangle. Texts are short, and everything else here is ragged.
        padded = qkv.new_zeros(batch * longest, qkv.shape[1]).index_copy(0, places, qkv)
        if padded.device.type == "cpu":
            # Torch's bf16 backward is much slower than its fp32 one on a CPU.
            padded = padded.float()
        size = words.shape[1] // self.heads
        q, k, v = padded.view(batch, longest, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        # An absent text would be a softmax over nothing: it reads its zeros, which nobody reads.
        readable = present | ~present.any(1, keepdim=True)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=readable[:, None, None])
        read = read.transpose(1, 2).flatten(2).flatten(0, 1)[places]
        words = words + self.out(read.to(words.dtype))
        return words + self.mlp(self.mlp_norm(words))
