"""What the machine says of itself at a report: memory and, of an NVIDIA GPU, power and heat."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


def memory(device: torch.device) -> dict[str, float]:
    """GiB by name: of a GPU the most since the last call, of this process on a CPU what is now."""
    if device.type == "cuda":
        found = {
            "memory/allocated_gib": torch.cuda.max_memory_allocated(device),
            "memory/reserved_gib": torch.cuda.max_memory_reserved(device),
        }
        torch.cuda.reset_peak_memory_stats(device)
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found = {"memory/resident_gib": pages * os.sysconf("SC_PAGE_SIZE")}
    return {name: size / 2**30 for name, size in found.items()}


class Nvml:
    """Power, clock, temperature and use of one GPU, as the driver gives them: nothing waits for it.

    What it does not give is said once, with its reason, and left out from then on.
    """

    def __init__(self, device: torch.device) -> None:
        self._readings: dict[str, Callable[[], float]] = {}
        if device.type != "cuda":
            return
        import pynvml

        nvml: Any = pynvml  # It has no types, and what a checker infers of it is wrong.
        self._error = pynvml.NVMLError
        # NVML counts all GPUs of the machine in the order of their slots; CUDA those it may see.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            nvml.nvmlInit()
            gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._error as error:
            log.warning("power, clock and heat of the GPU are not told: NVML says %r", str(error))
            return
        self._readings = {
            "gpu/power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "gpu/sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "gpu/temperature_celsius": lambda: nvml.nvmlDeviceGetTemperatureV(
                gpu, nvml.NVML_TEMPERATURE_GPU
            ),
            "gpu/utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
        }

    def read(self) -> dict[str, float]:
        """The readings by name. Utilisation is the share of time in which any kernel ran."""
        found = {}
        for name, reading in list(self._readings.items()):
            try:
                found[name] = reading()
            except self._error as error:
                log.warning("%s is not reported any more: NVML says %r", name, str(error))
                del self._readings[name]
        return found
