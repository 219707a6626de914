"""NVML readings of a GPU with a fake driver, memory statistics, and peak FLOP/s of devices."""

import logging
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from miro.training.flops import peak_flops
from miro.training.telemetry import Nvml, memory_stats

CUDA = torch.device("cuda", 1)
UUID = "c0ffee00-1234-5678-9abc-def012345678"


class Driver:
    """NVML's library as pynvml calls it: it writes through pointers and returns a code."""

    def __init__(self, **codes: int) -> None:
        """codes: return values of functions by name, instead of 0."""
        self.codes = codes

    def function(self, name: str) -> Any:
        def call(*given: Any) -> int:
            code = self.codes.get(name, 0)
            return code or getattr(self, name)(*given)

        return call

    def nvmlInitWithFlags(self, flags: int) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:
        known = uuid.value == f"GPU-{UUID}".encode()
        return 0 if known else pynvml.NVML_ERROR_NOT_FOUND

    def nvmlDeviceGetPowerUsage(self, handle: Any, milliwatts: Any) -> int:
        milliwatts._obj.value = 612_500
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, megahertz: Any) -> int:
        megahertz._obj.value = {pynvml.NVML_CLOCK_SM: 1755}[kind.value]
        return 0

    def nvmlDeviceGetTemperatureV(self, handle: Any, record: Any) -> int:
        assert record._obj.sensorType == pynvml.NVML_TEMPERATURE_GPU
        record._obj.temperature = 61
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        rates._obj.gpu, rates._obj.memory = 98, 40
        return 0


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(driver: Driver, uuid: str = UUID) -> None:
        monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", lambda: None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", driver.function)
        seen = {CUDA: SimpleNamespace(uuid=uuid)}
        monkeypatch.setattr(torch.cuda, "get_device_properties", seen.__getitem__)

    return put


def test_a_gpu_is_found_by_its_uuid(install: Any, caplog: pytest.LogCaptureFixture) -> None:
    install(Driver())

    assert Nvml(CUDA).read() == {
        "gpu/power_watts": 612.5,
        "gpu/sm_clock_mhz": 1755,
        "gpu/temperature_celsius": 61,
        "gpu/utilisation": 0.98,
    }
    assert not caplog.records


def test_an_unsupported_value_is_omitted_and_logged_once(
    install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    install(Driver(nvmlDeviceGetPowerUsage=pynvml.NVML_ERROR_NOT_SUPPORTED))
    nvml = Nvml(CUDA)

    first, second = nvml.read(), nvml.read()

    assert first == second and "gpu/power_watts" not in first and len(first) == 3
    assert [r.getMessage() for r in caplog.records] == [
        "gpu/power_watts is not reported any more: NVML says 'Not Supported'"
    ]


@pytest.mark.parametrize(
    ("driver", "uuid", "reason"),
    [
        (Driver(nvmlInitWithFlags=pynvml.NVML_ERROR_DRIVER_NOT_LOADED), UUID, "Driver Not Loaded"),
        (Driver(), "f00dfeed-1234-5678-9abc-def012345678", "Not Found"),
    ],
)
def test_a_gpu_unknown_to_nvml_is_logged(
    install: Any, caplog: pytest.LogCaptureFixture, driver: Driver, uuid: str, reason: str
) -> None:
    install(driver, uuid)

    assert Nvml(CUDA).read() == {}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and reason in record.getMessage()


def test_an_absent_nvml_library_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the real library where it is installed, which does not know the fake GPU."""
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    assert Nvml(CUDA).read() == {}
    assert "Not Found" in caplog.text


def test_a_cpu_is_not_queried(caplog: pytest.LogCaptureFixture) -> None:
    assert Nvml(torch.device("cpu")).read() == {}
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert not caplog.records


def test_the_memory_of_a_process_grows_by_its_tensors() -> None:
    before = memory_stats(torch.device("cpu"))["memory/resident_gib"]
    tensor = torch.ones(2**26)

    after = memory_stats(torch.device("cpu"))["memory/resident_gib"]

    assert after - before == pytest.approx(tensor.nbytes / 2**30, abs=0.02)


def test_peak_memory_is_reset_at_each_report(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated": 5 * 2**30, "reserved": 7 * 2**30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: stats["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: stats["reserved"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: stats.clear())

    assert memory_stats(CUDA) == {"memory/allocated_gib": 5.0, "memory/reserved_gib": 7.0}
    assert stats == {}


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H1000", "bf16", None),
    ],
)
def test_a_peak_is_found_by_the_full_name_of_the_device(
    name: str,
    precision: str,
    peak: float | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    caplog.set_level(logging.INFO)

    assert peak_flops(CUDA, precision) == peak
    assert ("give peak_flops" in caplog.text and name in caplog.text) == (peak is None)
