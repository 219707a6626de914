"""FLOPs of the network, in the one convention used everywhere: 2 for a multiply and an add.

Useful ones: matrix products that the network cannot do without. Not among them are what is computed
twice to save memory, what is padded, and what is elementwise, which is bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from miro.model.transformer import ModelConfig


def forward_flops(
    config: ModelConfig, x: Sequence[int], text: Sequence[int], rewards: Sequence[int]
) -> dict[str, float]:
    """FLOPs of a forward pass by its parts.

    Args:
        x: (B, C, H, W), the shape of the latents.
        text: (T, channels), the shape of the states of all B texts together. They are taken to be
            of equal length: of others a little more is computed where the words of a text read one
            another, which is less than a thousandth of all.
        rewards: (R, L), how many rewards, and levels they are known at: their tables are made once
            for all B images.
    """
    batch, channels, height, width = x
    words, text_channels = text
    count, levels = rewards
    dim, hidden = config.channels, config.hidden
    rows, columns = config.grid(height, width)
    tokens = batch * rows * columns
    patch = channels * config.patch**2
    block = 2 * tokens * dim * (4 * dim + 3 * hidden) + 2 * words * dim * 2 * dim
    attended = 4 * rows * columns * (tokens + words) * dim
    reading = 2 * words * dim * (4 * dim + 3 * hidden) + 4 * words * words / batch * dim
    # The embedding of time, a summary of each text and of none, and what all sites share.
    summary = 2 * dim * (text_channels + dim)
    vectors = batch * (2 * dim * (256 + dim) + summary + 2 * dim * 6 * dim) + summary
    table = 2 * count * levels * (17 * 128 + 128 * 6 * dim)
    return {
        "linear layers": config.depth * block,
        "attention": config.depth * attended,
        "text": config.text_depth * reading + 2 * words * text_channels * dim,
        "patches": 2 * 2 * tokens * patch * dim,
        "modulation": vectors + table,
    }


def training_flops(
    config: ModelConfig, x: Sequence[int], text: Sequence[int], rewards: Sequence[int]
) -> float:
    """FLOPs of a forward and backward pass: backward is two products for each one of forward."""
    return 3 * sum(forward_flops(config, x, text, rewards).values())
