"""What a device is taken to reach, and the time of operations under it: a PROJECTION.

`step_budget.py` counts the rows of a step; `report.py` and `plot.py` read them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from miro.training.flops import DEVICE_SPECS


@dataclass(frozen=True)
class Device:
    """What a device is taken to reach."""

    flops: float
    """Dense bf16 FLOP/s of the data sheet."""
    bandwidth: float
    """Bytes/s of the data sheet."""
    gemm: float = 0.79
    """Share of `flops` that matrix products reach: 784 of 989 TFLOP/s, measured on the H100
    (results/gpu-NVIDIA-H100-*.json); the same share elsewhere is an assumption."""
    attention: float = 0.25
    """Share of `flops` that attention reaches, whatever computes it: 0.2 to 0.3 there."""
    memory: float = 0.80
    """Share of `bandwidth` that everything else reaches; a copy reached 0.90 there."""
    launch: float = 2e-6
    """Seconds between one kernel's end and the next one's start, the host being ahead."""


DEVICES = {
    name: Device(DEVICE_SPECS[whole].flops, DEVICE_SPECS[whole].bandwidth)
    for name, whole in (
        ("H100 SXM", "NVIDIA H100 80GB HBM3"),
        ("H200", "NVIDIA H200"),
        ("B200", "NVIDIA B200"),
        ("MI300X", "AMD Instinct MI300X"),
    )
}


@dataclass
class Row:
    """An operation of the step, all its calls together."""

    op: str
    group: str
    calls: int = 0
    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    def bound(self, device: Device) -> tuple[str, float]:
        """Whether FLOPs or bytes take longer, and their seconds, launches left out."""
        share = device.attention if self.group == "attention" else device.gemm
        arithmetic = self.flops / (device.flops * share)
        movement = self.bytes / (device.bandwidth * device.memory)
        return ("FLOPs", arithmetic) if arithmetic > movement else ("bytes", movement)

    def seconds(self, device: Device) -> float:
        return self.bound(device)[1] + self.launches * device.launch


def grouped(rows: Sequence[Row]) -> list[Row]:
    """The rows of each group as one, the group for its name."""
    found: dict[str, Row] = {}
    for row in rows:
        total = found.setdefault(row.group, Row(row.group, row.group))
        total.calls += row.calls
        total.launches += row.launches
        total.flops += row.flops
        total.bytes += row.bytes
    return list(found.values())


def projected(rows: Sequence[Row], device: Device) -> float:
    """Seconds of a step by the assumptions of `device`."""
    return sum(row.seconds(device) for row in rows)


def seconds_by_group(rows: Sequence[Row], device: Device) -> dict[str, float]:
    """The same second for second, of each group."""
    found: dict[str, float] = {}
    for row in rows:
        found[row.group] = found.get(row.group, 0.0) + row.seconds(device)
    return found


def seconds_by_bound(rows: Sequence[Row], device: Device) -> dict[str, float]:
    """The same by what it waits for: FLOPs, bytes, or the next launch."""
    found = {"FLOPs": 0.0, "bytes": 0.0, "launches": 0.0}
    for row in rows:
        kind, seconds = row.bound(device)
        found[kind] += seconds
        found["launches"] += row.launches * device.launch
    return found
