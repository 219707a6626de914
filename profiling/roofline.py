"""Operations of a step and their projected time on a device, by a roofline model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from miro.training.flops import DEVICE_SPECS

# Kernels that an op of miro_kernels launches; tests/kernels/compiled/test_launches.py counts them.
LAUNCHES = {
    "reward_adaln": 1, "reward_gated_residual_adaln": 1, "reward_adaln_backward": 3,
    "reward_gated_residual_adaln_backward": 3, "qk_norm_rope": 1, "qk_norm_rope_backward": 2,
    "attention": 1, "attention_backward": 2, "swiglu": 1, "swiglu_backward": 1,
}  # fmt: skip
_GEMMS = {"mm", "addmm", "bmm", "baddbmm"}
_COPIES = {
    "cat", "clone", "copy_", "_to_copy", "index", "index_copy", "index_select", "stack",
    "slice_backward", "select_backward", "fill_", "zero_", "zeros", "zeros_like", "ones_like",
    "new_zeros", "index_add", "_index_put_impl_", "arange",
}  # fmt: skip


def group_of(op: str, namespace: str) -> str:
    """Group of an operation: attention, GEMM, fused, data movement or elementwise."""
    if "attention" in op:
        return "attention"
    if op in _GEMMS:
        return "GEMM"
    if namespace == "miro":
        return "fused"
    return "data movement" if op in _COPIES else "elementwise and reductions"


@dataclass
class Operation:
    """All calls of one operation in a step."""

    op: str
    group: str
    calls: int = 0
    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Device:
    """Peak rates of a device, and the assumed share of them that a step reaches."""

    flops: float
    """Dense bf16 FLOP/s of the data sheet."""
    bandwidth: float
    """Bytes/s of the data sheet."""
    gemm: float = 0.79
    """Share of `flops` in matrix products: 784 of 989 TFLOP/s, measured on the H100
    (results/gpu-NVIDIA-H100-*.json); an assumption for other devices."""
    attention: float = 0.25
    """Share of `flops` in attention, by any kernel: 0.2 to 0.3 on the H100."""
    memory: float = 0.80
    """Share of `bandwidth` in everything else; a copy reaches 0.90 on the H100."""
    launch: float = 2e-6
    """Seconds from the end of one kernel to the start of the next, with the host ahead."""


DEVICES = {
    name: Device(DEVICE_SPECS[full_name].flops, DEVICE_SPECS[full_name].bandwidth)
    for name, full_name in (
        ("H100 SXM", "NVIDIA H100 80GB HBM3"),
        ("H200", "NVIDIA H200"),
        ("B200", "NVIDIA B200"),
        ("MI300X", "AMD Instinct MI300X"),
    )
}


def project(operations: Iterable[Operation | dict[str, Any]], device: Device) -> Any:
    """Project the time of each operation: the larger of FLOPs and bytes, plus its launches.

    Returns:
        A DataFrame of the operations with the columns `bound` ("FLOPs" or "bytes"),
        `launch_seconds` and `seconds`, which includes the launches.
    """
    table: Any = pd.DataFrame(list(operations))
    share = np.where(table["group"] == "attention", device.attention, device.gemm)
    arithmetic = table["flops"] / (device.flops * share)
    movement = table["bytes"] / (device.bandwidth * device.memory)
    launch = table["launches"] * device.launch
    return table.assign(
        bound=np.where(arithmetic > movement, "FLOPs", "bytes"),
        launch_seconds=launch,
        seconds=np.maximum(arithmetic, movement) + launch,
    )


def by_group(table: Any) -> Any:
    """Sum the columns of a projection over each group, in order of appearance."""
    columns = ["calls", "launches", "flops", "bytes", "seconds"]
    return table.groupby("group", sort=False)[columns].sum()


def by_bound(table: Any) -> dict[str, float]:
    """Seconds bound by FLOPs, by bytes and by launches."""
    work: Any = (table["seconds"] - table["launch_seconds"]).groupby(table["bound"]).sum()
    return {
        "FLOPs": float(work.get("FLOPs", 0.0)),
        "bytes": float(work.get("bytes", 0.0)),
        "launches": float(table["launch_seconds"].sum()),
    }
