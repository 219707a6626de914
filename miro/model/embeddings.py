"""Time, place, text and reward embeddings of the flow transformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miro.model.blocks import TextBlock
from miro.model.packed_text import PackedText


def sinusoids(values: Tensor, channels: int, longest_period: float) -> Tensor:
    """Sines and cosines of `values` (...,) at geometric periods from 2π to `longest_period`·2π.

    Returns (..., channels) in fp32, cosines first (Transformer, arXiv 1706.03762, section 3.5).
    """
    steps = torch.arange(channels // 2, device=values.device, dtype=torch.float32)
    angles = values.float()[..., None] * torch.exp(
        -math.log(longest_period) * steps / (channels // 2)
    )
    return torch.cat((angles.cos(), angles.sin()), -1)


class TimeEmbedding(nn.Module):
    """(B,) times in [0, 1] to (B, D), through sinusoids and a two-layer MLP."""

    def __init__(self, channels: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: Tensor) -> Tensor:
        num_freqs = sinusoids(1000 * t, self.frequencies, longest_period=1e4)
        return self.mlp(num_freqs.to(next(self.mlp.parameters()).dtype))


class RewardTable(nn.Module):
    """What each reward adds to the modulation at each level: one MLP a reward, all in one product.

    A level s in [0, 1] is the rank of a score among the data, from worst to best: bin k of K is fed
    as k / (K − 1). The last layer starts at zero, so that a fresh network ignores rewards.
    """

    def __init__(self, rewards: int, outputs: int, channels: int = 128, num_freqs: int = 8) -> None:
        super().__init__()
        features = 2 * num_freqs + 1
        self.frequencies = nn.Buffer(math.pi * torch.arange(1, num_freqs + 1), persistent=False)
        self.hidden = nn.Parameter(torch.randn(rewards, features, channels) / math.sqrt(features))
        self.hidden_bias = nn.Parameter(torch.zeros(rewards, 1, channels))
        self.out = nn.Parameter(torch.zeros(rewards, channels, outputs))
        self.out_bias = nn.Parameter(torch.zeros(rewards, 1, outputs))

    def forward(self, levels: Tensor) -> Tensor:
        """(L,) or (R, L) levels in [0, 1] to (R, L, outputs)."""
        angles = levels.float()[..., None] * self.frequencies
        features = torch.cat((levels.float()[..., None], angles.sin(), angles.cos()), -1)
        features = features.to(self.hidden.dtype).expand(len(self.hidden), -1, -1)
        hidden = F.silu(torch.baddbmm(self.hidden_bias, features, self.hidden))
        return torch.baddbmm(self.out_bias, hidden, self.out)


class TextEmbedding(nn.Module):
    """The text's states as the transformer reads them.

    They are projected, told their place in order (a frozen encoder's states say what a word is and
    only weakly where it stands), and read one another in blocks of their own.
    """

    def __init__(
        self, text_channels: int, channels: int, depth: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TextBlock(channels, heads, hidden) for _ in range(depth))
        self.project = nn.Sequential(nn.Linear(text_channels, channels), nn.RMSNorm(channels))
        # The summary is added to the embedding of time, whose last bias serves both.
        self.summary = nn.Sequential(
            nn.Linear(text_channels, channels), nn.SiLU(), nn.Linear(channels, channels, bias=False)
        )

    def forward(self, text: PackedText) -> tuple[Tensor, Tensor]:
        """(T, D) words in their order, and (B, D) a summary of each text from its mean state."""
        lengths = text.offsets.diff()
        owner = torch.repeat_interleave(lengths, output_size=len(text.states))
        place = torch.arange(len(text.states), device=owner.device) - text.offsets[owner]
        projected = self.project(text.states)
        num_freqs = sinusoids(place, projected.shape[-1], longest_period=100.0)
        words = projected + math.sqrt(2) * num_freqs.to(projected.dtype)
        present = torch.arange(text.longest, device=owner.device) < lengths[:, None]
        for block in self.blocks:
            words = block(words, owner.long() * text.longest + place, present)
        summed = text.states.new_zeros(len(lengths), text.states.shape[1])
        mean = summed.index_add(0, owner, text.states) / lengths.clamp(min=1)[:, None]
        return words, self.summary(mean.to(text.states.dtype))


def _centred(length: int, base: int, device: torch.device | None) -> Tensor:
    """(length,) coordinates of an axis whose centre is that of an axis from 0 to base − 1."""
    return torch.arange(length, device=device) + (base - length) / 2


def pos_embed_2d_sincos(
    rows: int,
    columns: int,
    channels: int,
    base: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """(rows·columns, channels) fixed sines and cosines of each token's place, of unit variance.

    The periods run from two tokens to twice the grid's side, so that neighbours differ clearly on
    a grid of any size (learned places start too small to be noticed on a small budget). `base` is
    the (rows, columns) of the grid that decides them: another lies with its centre on that one's,
    its tokens as far apart, so that a place means the same in both.
    """
    quarter = channels // 4
    assert channels % 4 == 0
    base = base or (rows, columns)

    def axis(length: int, base: int) -> Tensor:
        # From π / (2·base) to π / 2, evenly spaced in their logarithm.
        share = 1 - torch.arange(quarter, device=device) / max(1, quarter - 1)
        frequencies = math.pi / 2 * base**-share
        angles = _centred(length, base, device)[:, None] * frequencies
        return math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), -1)

    down = axis(rows, base[0])[:, None].expand(rows, columns, -1)
    across = axis(columns, base[1])[None].expand(rows, columns, -1)
    return torch.cat((down, across), -1).reshape(rows * columns, channels)


def rope_angles(
    rows: int,
    columns: int,
    head_size: int,
    base: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (rows·columns, head size / 2): half of the pairs turn with the row.

    `base` as in `pos_embed_2d_sincos`.
    """
    quarter = head_size // 4
    assert head_size % 4 == 0
    base = base or (rows, columns)
    frequencies = 100.0 ** -(torch.arange(quarter, device=device) / quarter)
    row, column = _centred(rows, base[0], device), _centred(columns, base[1], device)
    down = row[:, None, None].expand(rows, columns, 1) * frequencies
    across = column[None, :, None].expand(rows, columns, 1) * frequencies
    angles = torch.cat((down, across), -1).reshape(rows * columns, head_size // 2)
    return angles.cos(), angles.sin()
