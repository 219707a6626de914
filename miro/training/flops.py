"""FLOPs of the network, by one convention (2 per multiply-add), and the peak FLOP/s of devices.

Counted are the matrix products that the network needs. Not counted: activations recomputed to save
memory, padding, and elementwise operations, which are bound by memory bandwidth.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from miro.model.transformer import ModelConfig

log = logging.getLogger(__name__)


def forward_flops(
    config: ModelConfig, x: Sequence[int], text: Sequence[int], rewards: Sequence[int]
) -> dict[str, float]:
    """Count the FLOPs of a forward pass by part of the network.

    Args:
        config: the network.
        x: (B, C, H, W), shape of the latents.
        text: (T, channels), shape of the packed states of all B captions. They are counted as of
            equal length; for unequal ones the self-attention of the text is under-counted, by less
            than a thousandth of the total.
        rewards: (R, L), number of rewards and of quantile levels. The reward tables are
            computed once for all B images.
    """
    batch, channels, height, width = x
    words, text_channels = text
    count, levels = rewards
    dim, hidden = config.channels, config.hidden
    rows, columns = config.grid(height, width)
    tokens = batch * rows * columns
    patch = channels * config.patch**2
    block = 2 * tokens * dim * (4 * dim + 3 * hidden) + 2 * words * dim * 2 * dim
    attention = 4 * rows * columns * (tokens + words) * dim
    text_block = 2 * words * dim * (4 * dim + 3 * hidden) + 4 * words * words / batch * dim
    # The timestep embedding, the pooled text of each image and of the null caption, and the
    # projection that all blocks share.
    pooled_text = 2 * dim * (text_channels + dim)
    vectors = batch * (2 * dim * (256 + dim) + pooled_text + 2 * dim * 6 * dim) + pooled_text
    table = 2 * count * levels * (17 * 128 + 128 * 6 * dim)
    return {
        "linear layers": config.depth * block,
        "attention": config.depth * attention,
        "text": config.text_depth * text_block + 2 * words * text_channels * dim,
        "patches": 2 * 2 * tokens * patch * dim,
        "modulation": vectors + table,
    }


def training_flops(
    config: ModelConfig, x: Sequence[int], text: Sequence[int], rewards: Sequence[int]
) -> float:
    """Count forward plus backward, which has two matrix products for each one of forward."""
    return 3 * sum(forward_flops(config, x, text, rewards).values())


@dataclass(frozen=True)
class DeviceSpec:
    """Peak rates of a device by its data sheet."""

    flops: float
    """bf16 FLOP/s of dense matrix products."""
    bandwidth: float
    """Bytes/s of its memory."""


# By the full name from `torch.cuda.get_device_name`: MIG slices and smaller variants of a GPU have
# names that share the prefix.
DEVICE_SPECS = {
    "NVIDIA A100-PCIE-40GB": DeviceSpec(312e12, 1.555e12),
    "NVIDIA A100-SXM4-40GB": DeviceSpec(312e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": DeviceSpec(312e12, 1.935e12),
    "NVIDIA A100-SXM4-80GB": DeviceSpec(312e12, 2.039e12),
    "NVIDIA L4": DeviceSpec(121e12, 0.3e12),
    "NVIDIA L40S": DeviceSpec(362e12, 0.864e12),
    "NVIDIA GeForce RTX 4090": DeviceSpec(165.2e12, 1.008e12),
    "NVIDIA GeForce RTX 5090": DeviceSpec(209.5e12, 1.792e12),
    "NVIDIA H100 PCIe": DeviceSpec(756e12, 2.0e12),
    "NVIDIA H100 NVL": DeviceSpec(835e12, 3.9e12),
    "NVIDIA H100 80GB HBM3": DeviceSpec(989e12, 3.35e12),
    "NVIDIA H200": DeviceSpec(989e12, 4.8e12),
    "NVIDIA H200 NVL": DeviceSpec(836e12, 4.8e12),
    "NVIDIA B200": DeviceSpec(2250e12, 8.0e12),
    "NVIDIA GB200": DeviceSpec(2500e12, 8.0e12),
    "AMD Instinct MI300X": DeviceSpec(1307e12, 5.3e12),
    "AMD Instinct MI300X OAM": DeviceSpec(1307e12, 5.3e12),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the device's peak FLOP/s in `precision`, or None with a log line if it is unknown.

    CPUs have none: their rate depends on clocks that no data sheet gives.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if precision == "bf16" and name in DEVICE_SPECS:
        return DEVICE_SPECS[name].flops
    log.info(
        "the peak of %r in %s is not known, so MFU is not reported; give peak_flops=FLOP/s",
        name,
        precision,
    )
    return None
