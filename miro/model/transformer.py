"""The flow transformer: latent patches in, velocity out; rewards and time enter by adaLN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miro.model.blocks import ATTENTION, Block, BlockContext, Modulation
from miro.model.embeddings import (
    RewardTable,
    TextEmbedding,
    TimeEmbedding,
    pos_embed_2d_sincos,
    rope_angles,
)
from miro.model.packed_text import PackedText


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network; independent of the rewards a run is conditioned on."""

    channels: int
    depth: int
    heads: int
    hidden: int
    """Width of the SwiGLU's hidden layer."""
    patch: int
    """Side of a patch, in latent pixels."""
    text_depth: int = 1
    """Transformer blocks over the text states, before they become keys and values of the image."""

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
        """Rows and columns of tokens of a latent.

        Raises:
            ValueError: The patch does not divide the latent.
        """
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"model: patch={self.patch} does not divide latents of {height}x{width}"
            )
        return height // self.patch, width // self.patch


class ContextKV(NamedTuple):
    """Text of a batch, encoded once and used at every sampling step. T is the sum of the lengths."""

    summary: Tensor  # (B, D)
    null_summary: Tensor  # (1, D), the summary of an empty text
    blocks: list[tuple[Tensor, Tensor]]  # (k, v) per block, each (T, heads, head size)
    offsets: Tensor  # (B + 1,) int32
    longest: int


class RewardCond(NamedTuple):
    """Reward conditions of a batch: indices into `levels`, and a mask of the rewards in use."""

    levels: Tensor  # (L,) in [0, 1]
    bins: Tensor  # (B, R) integers in [0, L)
    keep: Tensor  # (B, R) bool


def _run_block(
    block: Block, x: Tensor, h: Tensor, modulation: Modulation, context: BlockContext
) -> tuple[Tensor, Tensor]:
    return block(x, h, modulation, context)


def _run_checkpointed(
    block: Block, x: Tensor, h: Tensor, modulation: Modulation, context: BlockContext
) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return block(x, h, modulation, context)
    return cast(
        "tuple[Tensor, Tensor]",
        checkpoint(_run_block, block, x, h, modulation, context, use_reentrant=False),
    )


# Dynamo traces the function once and reuses the graph for every block (invoke_subgraph).
_run_region = cast("Callable[..., Any]", torch.compiler.nested_compile_region(_run_block))


class FlowTransformer(nn.Module):
    """Predict velocity (or the sample) from a noisy latent, a time, reward conditions and text.

    Patches, 2-D sin-cos positions, blocks with 2-D RoPE, QK-norm and SwiGLU, and adaLN modulation:
    gate, shift and scale of every norm are the sum of a part shared by all blocks, of the reward
    tables, and of the block's own offset (PixArt-α's adaLN-single, arXiv 2310.00426, with rewards
    added). Latents of another height and width than `latent_shape` are taken where the patch
    divides them: their centre coincides with the reference grid's, at the same scale.

    Args:
        config: width, depth and so on.
        latent_shape: (C, H, W) of the reference grid.
        text_channels: width of the frozen text encoder's states.
        rewards: number of reward slots R.
        activation_checkpointing: store only the input of each block and recompute the rest in
            backward.
        regional_compile: under torch.compile, compile one block and reuse it for all.
    """

    def __init__(
        self,
        config: ModelConfig,
        latent_shape: tuple[int, int, int],
        text_channels: int,
        rewards: int,
        *,
        activation_checkpointing: bool = False,
        regional_compile: bool = False,
    ) -> None:
        super().__init__()
        channels, *_ = latent_shape
        side, dim = config.patch, config.channels
        self.config, self.latent_shape = config, latent_shape
        self.activation_checkpointing = activation_checkpointing
        self.regional_compile = regional_compile
        self.run_block: Callable[..., Any] = _run_block
        if activation_checkpointing:
            self.run_block = _run_checkpointed
        elif regional_compile:
            self.run_block = _run_region
        rows, columns = config.grid(*latent_shape[1:])
        self.patches = nn.Linear(channels * side * side, dim)
        cos, sin = rope_angles(rows, columns, dim // config.heads)
        self.pos_embed = nn.Buffer(pos_embed_2d_sincos(rows, columns, dim), persistent=False)
        self.cos, self.sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)
        self.time = TimeEmbedding(dim)
        self.text = TextEmbedding(
            text_channels, dim, config.text_depth, config.heads, config.hidden
        )
        # Gate, shift and scale, for norms before attention (and the output) and before the MLP.
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
        """Project text states to the keys and values of every block, once for all steps."""
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
        """Predict from x_t (B, C, H, W) and t (B,) in [0, 1]; returns fp32 (B, C, H, W)."""
        dtype = self.patches.weight.dtype
        height, width = x_t.shape[2:]
        pos_embed, rope = self._positions(height, width)
        x = self.patches(self._patchify(x_t.to(dtype))) + pos_embed.to(dtype)
        base = self.shared(nn.functional.silu(self.time(t) + text.summary))
        base = base.unflatten(-1, (2, 3, -1)).unbind(1)
        table = self.table(rewards.levels).unflatten(-1, (2, 3, -1)).unbind(2)
        offsets: Any = self.offsets
        if self.regional_compile:
            # nested_compile_region refuses arguments that alias one another, as views do.
            base, table, offsets = ([z.clone() for z in views] for views in (base, table, offsets))
        modulation = Modulation(base, table, rewards.bins, rewards.keep)
        x, h = modulation.norm(ATTENTION, offsets[0], x, None)
        for index, (block, (k, v)) in enumerate(zip(self._blocks(), text.blocks, strict=True)):
            own = offsets[2 * index + 1], offsets[2 * index + 2]
            context = BlockContext(rope, k, v, text.offsets, text.longest)
            x, h = self.run_block(block, x, h, modulation._replace(offsets=own), context)
        return self._unpatchify(self.out(h), height, width).float()

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", self.blocks)

    def _positions(self, height: int, width: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Position embedding and RoPE (cos, sin) of a latent: the buffers, or computed anew."""
        _, *reference = self.latent_shape
        if height == reference[0] and width == reference[1]:
            return self.pos_embed, (self.cos, self.sin)
        grid, reference_grid = self.config.grid(height, width), self.config.grid(*reference)
        dim, device = self.config.channels, self.cos.device
        return (
            pos_embed_2d_sincos(*grid, dim, reference_grid, device),
            rope_angles(*grid, dim // self.config.heads, reference_grid, device),
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
