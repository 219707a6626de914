"""Memory use of a process or GPU; power, clock and temperature of an NVIDIA GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


def memory_stats(device: torch.device) -> dict[str, float]:
    """Return GiB by metric name: a GPU's peak since the last call, or this process's RSS now."""
    if device.type == "cuda":
        stats = {
            "memory/allocated_gib": torch.cuda.max_memory_allocated(device),
            "memory/reserved_gib": torch.cuda.max_memory_reserved(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        stats = {"memory/resident_gib": pages * os.sysconf("SC_PAGE_SIZE")}
    return {name: size / 2**30 for name, size in stats.items()}


class Nvml:
    """Power, clock, temperature and utilisation of a GPU, by NVML and without a CUDA sync.

    A value that the driver does not support is logged once with NVML's error and omitted from
    then on.
    """

    def __init__(self, device: torch.device) -> None:
        self._queries: dict[str, Callable[[], float]] = {}
        if device.type != "cuda":
            return
        import pynvml

        nvml: Any = pynvml  # It has no type hints, and pyright infers wrong ones.
        self._error = pynvml.NVMLError
        # NVML numbers all GPUs by PCI slot, CUDA only those in CUDA_VISIBLE_DEVICES.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            nvml.nvmlInit()
            gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._error as error:
            log.warning(
                "power, clock and temperature of the GPU are not reported: NVML says %r", str(error)
            )
            return
        self._queries = {
            "gpu/power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "gpu/sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "gpu/temperature_celsius": lambda: nvml.nvmlDeviceGetTemperatureV(
                gpu, nvml.NVML_TEMPERATURE_GPU
            ),
            "gpu/utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
        }

    def read(self) -> dict[str, float]:
        """Return the values by metric name; utilisation is the fraction of time a kernel ran."""
        values = {}
        for name, query in list(self._queries.items()):
            try:
                values[name] = query()
            except self._error as error:
                log.warning("%s is not reported any more: NVML says %r", name, str(error))
                del self._queries[name]
        return values
