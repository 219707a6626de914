"""Embeddings of time, position, text and rewards."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miro.model.blocks import TextBlock
from miro.model.packed_text import PackedText


def sinusoids(values: Tensor, channels: int, longest_period: float) -> Tensor:
    """Sinusoidal embedding of values (...,) as (..., channels) fp32, cosines first.

    The periods are geometric, from 2π to 2π · longest_period (arXiv 1706.03762, section 3.5).
    """
    steps = torch.arange(channels // 2, device=values.device, dtype=torch.float32)
    angles = values.float()[..., None] * torch.exp(
        -math.log(longest_period) * steps / (channels // 2)
    )
    return torch.cat((angles.cos(), angles.sin()), -1)


class TimeEmbedding(nn.Module):
    """(B,) times in [0, 1] to (B, D): sinusoids of 1000·t, then a two-layer MLP."""

    def __init__(self, channels: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, channels), nn.SiLU(), nn.Linear(channels, channels)
        )

    def forward(self, t: Tensor) -> Tensor:
        """Embed t in the dtype of the weights."""
        features = sinusoids(1000 * t, self.frequencies, longest_period=1e4)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class RewardTable(nn.Module):
    """What each reward adds to the modulation at each quantile level s.

        table[r] = MLP_r(s, sin(π·n·s), cos(π·n·s) for n = 1 … num_freqs)

    MIRO embeds a reward's bin with sinusoids and an MLP (arXiv 2510.25897); here the result enters
    by adaLN instead of as a token. The MLPs of all rewards run as one batched matmul. Their last
    layer is initialized to zero, so that an untrained network ignores rewards.
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
        """(L,) quantile levels, or (R, L) of each reward's own, to (R, L, outputs)."""
        angles = levels.float()[..., None] * self.frequencies
        features = torch.cat((levels.float()[..., None], angles.sin(), angles.cos()), -1)
        features = features.to(self.hidden.dtype).expand(len(self.hidden), -1, -1)
        hidden = F.silu(torch.baddbmm(self.hidden_bias, features, self.hidden))
        return torch.baddbmm(self.out_bias, hidden, self.out)


class TextEmbedding(nn.Module):
    """Frozen text states to the tokens that image blocks attend to, and a summary of each text.

    Tokens are projected, given a position embedding (a frozen encoder's states carry the order of
    words only weakly) and passed through text blocks.
    """

    def __init__(
        self, text_channels: int, channels: int, depth: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TextBlock(channels, heads, hidden) for _ in range(depth))
        self.project = nn.Sequential(nn.Linear(text_channels, channels), nn.RMSNorm(channels))
        # Without a last bias: the summary is added to the time embedding, which has one.
        self.summary = nn.Sequential(
            nn.Linear(text_channels, channels), nn.SiLU(), nn.Linear(channels, channels, bias=False)
        )

    def forward(self, text: PackedText) -> tuple[Tensor, Tensor]:
        """Packed tokens (T, D), and a summary (B, D) from the mean of each text's states."""
        lengths = text.offsets.diff()
        sample = torch.repeat_interleave(lengths, output_size=len(text.states))
        position = torch.arange(len(text.states), device=sample.device) - text.offsets[sample]
        projected = self.project(text.states)
        pos_embed = sinusoids(position, projected.shape[-1], longest_period=100.0)
        tokens = projected + math.sqrt(2) * pos_embed.to(projected.dtype)
        mask = torch.arange(text.longest, device=sample.device) < lengths[:, None]
        for block in self.blocks:
            tokens = block(tokens, sample.long() * text.longest + position, mask)
        total = text.states.new_zeros(len(lengths), text.states.shape[1])
        mean = total.index_add(0, sample, text.states) / lengths.clamp(min=1)[:, None]
        return tokens, self.summary(mean.to(text.states.dtype))


def _centred(length: int, reference: int, device: torch.device | None) -> Tensor:
    """(length,) coordinates whose centre is that of an axis from 0 to reference − 1."""
    return torch.arange(length, device=device) + (reference - length) / 2


def pos_embed_2d_sincos(
    rows: int,
    columns: int,
    channels: int,
    reference_grid: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Fixed 2-D sinusoidal position embedding of unit variance (as in ViT and DiT).

    The periods run from two tokens to twice the grid's side, so that neighbouring tokens differ
    clearly on a grid of any size.

    Args:
        rows: rows of tokens.
        columns: columns of tokens.
        channels: width, divisible by 4.
        reference_grid: (rows, columns) of the grid that sets the periods; other grids share its
            centre and its distance between tokens. None: this grid.
        device: of the result.

    Returns:
        (rows · columns, channels) fp32.
    """
    quarter = channels // 4
    assert channels % 4 == 0
    reference_grid = reference_grid or (rows, columns)

    def axis(length: int, reference: int) -> Tensor:
        # Frequencies from π / (2 · reference) to π / 2, evenly spaced in their logarithm.
        exponent = 1 - torch.arange(quarter, device=device) / max(1, quarter - 1)
        frequencies = math.pi / 2 * reference**-exponent
        angles = _centred(length, reference, device)[:, None] * frequencies
        return math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), -1)

    vertical = axis(rows, reference_grid[0])[:, None].expand(rows, columns, -1)
    horizontal = axis(columns, reference_grid[1])[None].expand(rows, columns, -1)
    return torch.cat((vertical, horizontal), -1).reshape(rows * columns, channels)


def rope_angles(
    rows: int,
    columns: int,
    head_size: int,
    reference_grid: tuple[int, int] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D RoPE, each (rows · columns, head size / 2) fp32.

    The first half of the pairs rotates with the row, the second with the column (axial RoPE, arXiv
    2403.13298). `reference_grid` as in `pos_embed_2d_sincos`.
    """
    quarter = head_size // 4
    assert head_size % 4 == 0
    reference_grid = reference_grid or (rows, columns)
    frequencies = 100.0 ** -(torch.arange(quarter, device=device) / quarter)
    row = _centred(rows, reference_grid[0], device)
    column = _centred(columns, reference_grid[1], device)
    vertical = row[:, None, None].expand(rows, columns, 1) * frequencies
    horizontal = column[None, :, None].expand(rows, columns, 1) * frequencies
    angles = torch.cat((vertical, horizontal), -1).reshape(rows * columns, head_size // 2)
    return angles.cos(), angles.sin()
