"""Embeddings of time, position, text and rewards."""

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
    """Sinusoidal embedding of the time, then a two-layer MLP."""

    def __init__(self, channels: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Map times (B,) in [0, 1] to (B, D)."""
        features = sinusoids(1000 * t, self.frequencies, longest_period=1e4)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class RewardTable(nn.Module):
    """Modulation added by each reward at each quantile level: one MLP per reward, batched.

    Bin k of K enters as the level k / (K − 1), expanded in Fourier features. The output layer is
    zero-initialised, so a new network ignores rewards (MIRO, arXiv 2510.25897, section 3).
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
        """Map levels (L,) or (R, L) in [0, 1] to (R, L, outputs)."""
        angles = levels.float()[..., None] * self.frequencies
        features = torch.cat((levels.float()[..., None], angles.sin(), angles.cos()), -1)
        features = features.to(self.hidden.dtype).expand(len(self.hidden), -1, -1)
        hidden = F.silu(torch.baddbmm(self.hidden_bias, features, self.hidden))
        return torch.baddbmm(self.out_bias, hidden, self.out)


class TextEmbedding(nn.Module):
    """Projection, position embedding and self-attention blocks over a frozen encoder's states.

    Position is embedded again because the states of a frozen encoder carry it only weakly.
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
        """Return token states (T, D), and a summary (B, D) of each text from its mean state."""
        lengths = text.offsets.diff()
        owner = torch.repeat_interleave(lengths, output_size=len(text.states))
        position = torch.arange(len(text.states), device=owner.device) - text.offsets[owner]
        projected = self.project(text.states)
        pos_embed = sinusoids(position, projected.shape[-1], longest_period=100.0)
        words = projected + math.sqrt(2) * pos_embed.to(projected.dtype)
        mask = torch.arange(text.longest, device=owner.device) < lengths[:, None]
        for block in self.blocks:
            words = block(words, owner.long() * text.longest + position, mask)
        summed = text.states.new_zeros(len(lengths), text.states.shape[1])
        mean = summed.index_add(0, owner, text.states) / lengths.clamp(min=1)[:, None]
        return words, self.summary(mean.to(text.states.dtype))


def _centred(length: int, reference: int, device: torch.device | None) -> Tensor:
    """Coordinates (length,) of an axis centred on the reference axis 0 … reference − 1."""
    return torch.arange(length, device=device) + (reference - length) / 2


def pos_embed_2d_sincos(
    rows: int,
    columns: int,
    channels: int,
    reference_grid: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Compute fixed 2-D sine-cosine position embeddings of unit variance.

    Periods run from two tokens to twice the grid's side, so that neighbours differ clearly on a
    grid of any size.

    Args:
        rows: Tokens down.
        columns: Tokens across.
        channels: D, divisible by 4.
        reference_grid: (rows, columns) that sets the periods; the grid is centred on it at the same
            scale. Defaults to the grid itself.
        device: Of the result.

    Returns:
        fp32 (rows · columns, D).
    """
    quarter = channels // 4
    assert channels % 4 == 0
    reference_grid = reference_grid or (rows, columns)

    def axis(length: int, reference: int) -> Tensor:
        # Frequencies from π / (2 · reference) to π / 2, log-spaced.
        share = 1 - torch.arange(quarter, device=device) / max(1, quarter - 1)
        frequencies = math.pi / 2 * reference**-share
        angles = _centred(length, reference, device)[:, None] * frequencies
        return math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), -1)

    down = axis(rows, reference_grid[0])[:, None].expand(rows, columns, -1)
    across = axis(columns, reference_grid[1])[None].expand(rows, columns, -1)
    return torch.cat((down, across), -1).reshape(rows * columns, channels)


def rope_angles(
    rows: int,
    columns: int,
    head_size: int,
    reference_grid: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute 2-D RoPE angles: half of the channel pairs rotate with the row, half with the column.

    Source: RoFormer (arXiv 2104.09864), on two axes. Arguments as in `pos_embed_2d_sincos`.

    Returns:
        cos and sin, fp32 (rows · columns, head_size / 2) each.
    """
    quarter = head_size // 4
    assert head_size % 4 == 0
    reference_grid = reference_grid or (rows, columns)
    frequencies = 100.0 ** -(torch.arange(quarter, device=device) / quarter)
    row, column = (
        _centred(rows, reference_grid[0], device),
        _centred(columns, reference_grid[1], device),
    )
    down = row[:, None, None].expand(rows, columns, 1) * frequencies
    across = column[None, :, None].expand(rows, columns, 1) * frequencies
    angles = torch.cat((down, across), -1).reshape(rows * columns, head_size // 2)
    return angles.cos(), angles.sin()
