"""FlowTransformer: a diffusion transformer whose adaLN carries time, text and reward conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miro.model.blocks import Block, Modulation, TextKV, modulated_norm
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
    """Sizes of the network; none of them depends on the rewards a run trains on."""

    channels: int
    depth: int
    heads: int
    hidden: int
    """Width of the SwiGLU's hidden layer."""
    patch: int
    """Side of a patch, in latent pixels."""
    text_depth: int = 1
    """Number of text blocks, applied to the frozen encoder's states before the image blocks."""

    def __post_init__(self) -> None:
        least = {"channels": 1, "depth": 1, "heads": 1, "hidden": 1, "patch": 1, "text_depth": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"model.{name} must be at least {low}, got {getattr(self, name)}")
        if self.channels % self.heads or self.channels // self.heads % 4:
            raise ValueError(
                f"model: channels={self.channels} must split into heads={self.heads} "
                "of a size divisible by 4 (2-D RoPE)"
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent.

        Raises:
            ValueError: the patch does not divide the latent.
        """
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"model: patch={self.patch} does not divide latents of {height}x{width}"
            )
        return height // self.patch, width // self.patch


class ContextKV(NamedTuple):
    """A batch of texts as the blocks use it: computed once, valid at every sampling step."""

    summary: Tensor  # (B, D), added to the time embedding
    null_summary: Tensor  # (1, D), the summary of an empty text
    kv: list[tuple[Tensor, Tensor]]  # keys and values of each block, (T, heads, head size)
    offsets: Tensor  # (B + 1,) int32
    longest: int


class RewardCond(NamedTuple):
    """Reward conditions of a batch: quantile levels by index, and which of them are used."""

    levels: Tensor  # (L,) quantile levels in [0, 1]
    bins: Tensor  # (B, R) integers in [0, L), an index into `levels`
    keep: Tensor  # (B, R) bool; False where a reward is unknown or dropped


def _run_block(block: Block, *args: Any) -> tuple[Tensor, Tensor]:
    return block(*args)


_run_block_as_region = cast("Callable[..., Any]", torch.compiler.nested_compile_region(_run_block))


class FlowTransformer(nn.Module):
    """The network v_θ(x_t, t, c, s): a noisy latent, time, text and rewards to the prediction.

    Each block has two adaLNs, before its attention and before its MLP, and one more precedes the
    output layer. They share a projection of time and text and a table of rewards, one for the
    attention's and the output's and one for the MLP's (see `Modulation`).
    """

    def __init__(
        self,
        config: ModelConfig,
        latent_shape: tuple[int, int, int],
        text_channels: int,
        rewards: int,
        *,
        regional_compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        """Build the network with fp32 weights.

        Args:
            config: sizes.
            latent_shape: (C, H, W) of the reference grid, whose position embeddings are buffers.
                Latents of other sizes share its centre and its scale.
            text_channels: width of the frozen text encoder's states.
            rewards: number R of reward conditions.
            regional_compile: under torch.compile, compile one block and reuse it for all.
            activation_checkpointing: recompute each block in backward, to save memory.
        """
        super().__init__()
        channels, height, width = latent_shape
        side, dim = config.patch, config.channels
        self.config, self.latent_shape = config, latent_shape
        self.regional_compile = regional_compile
        self.activation_checkpointing = activation_checkpointing
        rows, columns = config.grid(height, width)
        self.patches = nn.Linear(channels * side * side, dim)
        cos, sin = rope_angles(rows, columns, dim // config.heads)
        self.pos_embed = nn.Buffer(pos_embed_2d_sincos(rows, columns, dim), persistent=False)
        self.cos, self.sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)
        self.time = TimeEmbedding(dim)
        self.text = TextEmbedding(
            text_channels, dim, config.text_depth, config.heads, config.hidden
        )
        # Two sets (attention and output; MLP) of gate, shift and scale.
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
        """Text states to what every block needs of them; a sampler calls it once."""
        states = text.states.to(self.patches.weight.dtype)
        tokens, summary = self.text(PackedText(states, text.offsets, text.longest))
        return ContextKV(
            summary,
            self.text.summary(states.new_zeros(1, states.shape[1])),
            [block.attention.text(tokens) for block in cast("list[Block]", self.blocks)],
            text.offsets,
            text.longest,
        )

    def forward(self, x_t: Tensor, t: Tensor, rewards: RewardCond, context: ContextKV) -> Tensor:
        """Predict the velocity, or the clean sample, as `FlowConfig.prediction_type` says.

        Args:
            x_t: (B, C, H, W) noisy latents; the patch divides H and W.
            t: (B,) times in [0, 1].
            rewards: reward conditions.
            context: the texts, from `encode_context`.

        Returns:
            (B, C, H, W) fp32.
        """
        dtype = self.patches.weight.dtype
        height, width = x_t.shape[2:]
        pos_embed, rope = self._positions(height, width)
        x = self.patches(self._patchify(x_t.to(dtype))) + pos_embed.to(dtype)

        shared = self.shared(F.silu(self.time(t) + context.summary))
        shared = shared.unflatten(-1, (2, 3, -1)).unbind(1)
        table = self.table(rewards.levels).unflatten(-1, (2, 3, -1)).unbind(2)
        # Under no_grad, views of a trainable parameter have requires_grad but no grad_fn, which the
        # module hooks of FlopCounterMode reject.
        offsets: Any = self.offsets if torch.is_grad_enabled() else self.offsets.detach()
        if self.regional_compile:
            # Inputs of a compiled region must not alias one another.
            shared, table, offsets = ([z.clone() for z in y] for y in (shared, table, offsets))

        def modulation(n: int) -> Modulation:  # of the n-th adaLN of the network
            terms = shared[n % 2], offsets[n], table[n % 2]
            return Modulation(*terms, rewards.bins, rewards.keep)

        h = modulated_norm(x, modulation(0))
        run = self._block_runner()
        for n, (block, kv) in enumerate(zip(self.blocks, context.kv, strict=True)):
            mods = modulation(2 * n + 1), modulation(2 * n + 2)
            x, h = run(block, x, h, mods, TextKV(*kv, context.offsets, context.longest), rope)
        return self._unpatchify(self.out(h), height, width).float()

    def _block_runner(self) -> Callable[..., Any]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return partial(checkpoint, _run_block, use_reentrant=False)
        return _run_block_as_region if self.regional_compile else _run_block

    def _positions(self, height: int, width: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Position embedding, and cos and sin of RoPE, of a latent's tokens."""
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
        """(B, C, H, W) to (B, N, C · patch²)."""
        side = self.config.patch
        rows, columns = self.config.grid(*x.shape[2:])
        x = x.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C · patch²) to (B, C, H, W)."""
        side, channels = self.config.patch, self.latent_shape[0]
        x = tokens.unflatten(1, self.config.grid(height, width))
        x = x.unflatten(-1, (channels, side, side))
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
