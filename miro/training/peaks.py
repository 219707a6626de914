"""What devices reach at most by their makers' data sheets: what utilisation is a share of."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peak:
    """Of one device."""

    flops: float
    """bf16 FLOP/s of matrix products, without sparsity."""
    bandwidth: float
    """Bytes/s of its memory."""


# By the whole name that `torch.cuda.get_device_name` gives: a slice of a GPU, or a variant of one
# with fewer units, has a name that only begins alike.
PEAKS = {
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 1.555e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1.935e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "NVIDIA L4": Peak(121e12, 0.3e12),
    "NVIDIA L40S": Peak(362e12, 0.864e12),
    "NVIDIA GeForce RTX 4090": Peak(165.2e12, 1.008e12),
    "NVIDIA GeForce RTX 5090": Peak(209.5e12, 1.792e12),
    "NVIDIA H100 PCIe": Peak(756e12, 2.0e12),
    "NVIDIA H100 NVL": Peak(835e12, 3.9e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),
    "NVIDIA H200": Peak(989e12, 4.8e12),
    "NVIDIA H200 NVL": Peak(836e12, 4.8e12),
    "NVIDIA B200": Peak(2250e12, 8.0e12),
    "NVIDIA GB200": Peak(2500e12, 8.0e12),
    "AMD Instinct MI300X": Peak(1307e12, 5.3e12),
    "AMD Instinct MI300X OAM": Peak(1307e12, 5.3e12),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the device in `precision`; None where the table has none, which the log says.

    A CPU has none: what its units reach depends on clocks that nobody names.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if precision == "bf16" and name in PEAKS:
        return PEAKS[name].flops
    log.info(
        "the peak of %r in %s is not known, so MFU is not reported; give peak_flops=FLOP/s",
        name,
        precision,
    )
    return None
