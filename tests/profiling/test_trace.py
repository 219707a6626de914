"""record_trace.py: its counts on synthetic events and on a real step."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import record_trace
import torch
from record_trace import idle_share, most_expensive, operations, synchronisations, traced
from torch import Tensor
from torch.autograd import DeviceType
from worker import Phases, Step

from miro.training.metrics_log import read_metrics


class ReadingStep(Step):
    """A step that copies values to the host in forward, in data and after its end."""

    settings = {"device": "cpu"}

    def run(self, number: int, phases: Phases) -> Tensor:
        with phases("data"):
            x = torch.ones(4) * torch.ones(1).item()
        with phases("forward"):
            loss = x.sum()
            bool(loss > 0)
        with phases("metrics"):
            loss.item()
        float(loss)
        return loss

    def useful(self) -> Tensor:
        return torch.zeros(())


def test_host_synchronisations_within_a_step_are_counted() -> None:
    profiler = traced(ReadingStep(), steps=3)

    assert synchronisations(profiler.events()) == {"host_reads": 3 * 3, "waits": 0}
    names = {row["name"]: row["calls"] for row in most_expensive(profiler, 3, on_gpu=False)}
    assert names["aten::sum"] == 1 and "forward" not in names


def test_only_outermost_operations_are_counted() -> None:
    profiler = traced(ReadingStep(), steps=3, report=lambda: torch.ones(2).mean().item())

    events = profiler.events()
    # sum, gt and bool; item; ones, mean and item: ones and item call others.
    assert operations(events, ["forward"]) == 3 * 3
    assert operations(events, ["metrics"]) == 3
    assert operations(events, ["report"]) == 3


@dataclass
class Event:
    name: str
    start: float
    end: float
    device_type: Any = DeviceType.CUDA

    @property
    def time_range(self) -> "Event":
        return self


def test_the_idle_share_is_the_time_between_kernels() -> None:
    kernels = [Event("a", 10, 14), Event("b", 12, 16), Event("c", 18, 20)]
    host = [Event("forward", 0, 30), Event("aten::mm", 0, 9, DeviceType.CPU)]

    assert idle_share([*host, *kernels]) == pytest.approx(2 / 10)
    assert idle_share(host) is None


def test_the_ranges_of_our_step_are_in_the_trace(tmp_path: Path) -> None:
    command = [sys.executable, record_trace.__file__, "--scale", "16", "--batch", "2"]
    command += ["--text", "3", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]

    run = subprocess.run(command, capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "summary.json").read_text())
    assert record["counted"]["waits"] == 0
    counted = record["counted"]["operations"]
    assert counted["metrics"] == 0 and 0 < counted["report"] < counted["step"]
    assert 0 < record["reporting"] < 0.01
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["images"] == 2 * (2 + 2) and "loss_by_reward/reward 6/high" in line
    assert len(record["most_expensive"]) == 10 and record["device_idle"] is None
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in record_trace.RANGES} == {
        "data": 2, "forward": 2, "backward": 2, "optimizer": 2, "metrics": 2, "report": 1,
    }  # fmt: skip
