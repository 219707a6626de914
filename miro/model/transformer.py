"""The flow transformer: image patches in, velocity out; rewards and time enter by modulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miro.model.blocks import Block
from miro.model.embeddings import (
    RewardTable,
    TextEmbedding,
    TimeEmbedding,
    pos_embed_2d_sincos,
    rope_angles,
)
from miro.model.packed_text import PackedText
from miro_kernels import reward_adaln


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the network. Nothing in it depends on the rewards a run trains on."""

    channels: int
    depth: int
    heads: int
    hidden: int
    """Width of the SwiGLU's hidden layer."""
    patch: int
    """Side of a patch, in latent pixels."""
    text_depth: int = 1
    """Blocks in which the words of a text read one another, before the image reads them."""

    def __post_init__(self) -> None:
        least = {"channels": 1, "depth": 1, "heads": 1, "hidden": 1, "patch": 1, "text_depth": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"model.{name} must be at least {low}, got {getattr(self, name)}")
        if self.channels % self.heads or self.channels // self.heads % 4:
            raise ValueError(
                f"model: channels={self.channels} must split into heads={self.heads} "
                "of a size divisible by 4 (2-D rotation)"
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent; ValueError where the patch does not divide it."""
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"model: patch={self.patch} does not divide latents of {height}x{width}"
            )
        return height // self.patch, width // self.patch


class ContextKV(NamedTuple):
    """What the network needs of a batch of texts: computed once, used at every step."""

    summary: Tensor  # (B, D)
    absent: Tensor  # (1, D), the summary of a text that is not there
    blocks: list[tuple[Tensor, Tensor]]  # a block's keys and values, each (T, heads, head size)
    offsets: Tensor  # (B + 1,) int32
    longest: int


class RewardCond(NamedTuple):
    """Reward conditions of a batch: an index into `levels`, and whether the reward is known."""

    levels: Tensor  # (L,) in [0, 1]
    bins: Tensor  # (B, R) integers in [0, L)
    keep: Tensor  # (B, R) bool


class _Sites(NamedTuple):
    """What modulates all sites, by their kind: attention and output, or MLP. Gate, shift, scale."""

    base: Sequence[Tensor]  # of each kind (B, 3, D)
    table: Sequence[Tensor]  # of each kind (R, L, 3, D)
    bins: Tensor  # (B, R)
    keep: Tensor  # (B, R)


def _norm(
    sites: _Sites, kind: int, offset: Tensor, x: Tensor, branch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The residual stream with the branch before it, and normed for the branch behind."""
    base, table = sites.base[kind], sites.table[kind]
    if branch is None:  # Then there is no gate.
        base, offset, table = base[:, 1:], offset[1:], table[:, :, 1:]
    out = reward_adaln(x, base, offset, table, sites.bins, sites.keep, branch=branch)
    return out if isinstance(out, tuple) else (x, out)


def _through(
    block: Block,
    sites: _Sites,
    offsets: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    text_offsets: Tensor,
    longest: int,
    x: Tensor,
    h: Tensor,
) -> tuple[Tensor, Tensor]:
    """The residual stream and what is normed of it, from the entry of a block to its end."""
    branch = block.attention(h, rope, keys, text_offsets, longest)
    x, h = _norm(sites, 1, offsets[0], x, branch)
    return _norm(sites, 0, offsets[1], x, block.mlp(h))


_one_for_all = cast("Callable[..., Any]", torch.compiler.nested_compile_region(_through))


class FlowTransformer(nn.Module):
    """x_t (B, C, H, W), t (B,), rewards and text to the raw prediction (B, C, H, W).

    `latent_shape` is the grid it keeps the pos_embed of. Latents of any other height and width that
    the patch divides are taken too: their centre lies on that grid's, at the same scale.

    A site is a place where the residual stream is normed: the entry of each attention, the entry
    of each MLP, and the output. Its modulation (gate of the branch before it, shift, scale) is the
    sum of a part shared by all sites of its kind, from time and text, of the rewards' table, and of
    the site's own offset (PixArt-α's adaLN-single, arXiv 2310.00426, with rewards added).
    """

    def __init__(
        self,
        config: ModelConfig,
        latent_shape: tuple[int, int, int],
        text_channels: int,
        rewards: int,
    ) -> None:
        super().__init__()
        channels, *_ = latent_shape
        side, dim = config.patch, config.channels
        self.config, self.latent_shape = config, latent_shape
        self.activation_checkpointing = (
            False  # Whether backward computes the blocks again, to save memory.
        )
        self.regional_compile = False  # Whether torch.compile translates one block for all.
        rows, columns = config.grid(*latent_shape[1:])
        self.patches = nn.Linear(channels * side * side, dim)
        cos, sin = rope_angles(rows, columns, dim // config.heads)
        self.pos_embed = nn.Buffer(pos_embed_2d_sincos(rows, columns, dim), persistent=False)
        self.cos, self.sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)
        self.time = TimeEmbedding(dim)
        self.text = TextEmbedding(
            text_channels, dim, config.text_depth, config.heads, config.hidden
        )
        # Two kinds of sites (attention and output; MLP), each with gate, shift and scale.
        self.shared = nn.Linear(dim, 2 * 3 * dim)
        self.table = RewardTable(rewards, outputs=2 * 3 * dim)
        self.offsets = nn.Parameter(torch.zeros(2 * config.depth + 1, 3, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.hidden) for _ in range(config.depth)
        )
        self.out = nn.Linear(dim, channels * side * side)
        for layer in (self.shared, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode_context(self, text: PackedText) -> ContextKV:
        """Project the text states once; the result serves every step of a sampler."""
        states = text.states.to(self.patches.weight.dtype)
        words, summary = self.text(PackedText(states, text.offsets, text.longest))
        return ContextKV(
            summary,
            self.text.summary(states.new_zeros(1, states.shape[1])),
            [block.attention.text(words) for block in self._blocks()],
            text.offsets,
            text.longest,
        )

    def forward(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: ContextKV) -> Tensor:
        dtype = self.patches.weight.dtype
        height, width = x_t.shape[2:]
        pos_embed, rope = self._grid(height, width)
        x = self.patches(self._patchify(x_t.to(dtype))) + pos_embed.to(dtype)
        base = self.shared(nn.functional.silu(self.time(t) + text.summary))
        base = base.unflatten(-1, (2, 3, -1)).unbind(1)
        table = self.table(rewards.levels).unflatten(-1, (2, 3, -1)).unbind(2)
        offsets: Any = self.offsets
        if self.regional_compile:
            # No two arguments of a region may share memory.
            base, table, offsets = ([z.clone() for z in views] for views in (base, table, offsets))
        sites = _Sites(base, table, rewards.bins, rewards.keep)
        x, h = _norm(sites, 0, offsets[0], x, None)
        through: Callable[..., Any] = _through
        if self.activation_checkpointing and torch.is_grad_enabled():
            through = partial(checkpoint, _through, use_reentrant=False)
        elif self.regional_compile:
            through = _one_for_all
        for index, (block, keys) in enumerate(zip(self._blocks(), text.blocks, strict=True)):
            own = offsets[2 * index + 1], offsets[2 * index + 2]
            x, h = through(block, sites, own, rope, keys, text.offsets, text.longest, x, h)
        return self._unpatchify(self.out(h), height, width).float()

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", self.blocks)

    def _grid(self, height: int, width: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Places and angles of a latent's tokens: kept, or where they lie about those kept."""
        _, *own = self.latent_shape
        if height == own[0] and width == own[1]:
            return self.pos_embed, (self.cos, self.sin)
        grid, base = self.config.grid(height, width), self.config.grid(*own)
        dim, device = self.config.channels, self.cos.device
        return (
            pos_embed_2d_sincos(*grid, dim, base, device),
            rope_angles(*grid, dim // self.config.heads, base, device),
        )

    def _patchify(self, x: Tensor) -> Tensor:
        side = self.config.patch
        rows, columns = self.config.grid(*x.shape[2:])
        x = x.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        side, channels = self.config.patch, self.latent_shape[0]
        x = tokens.unflatten(1, self.config.grid(height, width))
        x = x.unflatten(-1, (channels, side, side))
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
