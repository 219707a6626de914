"""The metrics of a run, which add no operation and no host sync to its steps."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from miro.conditioning import ConditioningConfig
from miro.model.transformer import RewardCond
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.flops import training_flops
from miro.training.loop import train
from miro.training.metrics import MetricsTracker, StepRecord, loss_groups, loss_sums
from miro.training.metrics_log import MetricsWriter, read_metrics
from miro.training.presets import demo
from miro_kernels.lab.eager import FREE


def records(losses: Tensor, t: Tensor, bins: Tensor, keep: Tensor, levels: int) -> list[StepRecord]:
    """Two micro-batches of unequal size."""
    rewards = [RewardCond(torch.linspace(0, 1, levels), bins[p], keep[p]) for p in (PART, REST)]
    return [StepRecord(losses[p], t[p], r, 1.0) for p, r in zip((PART, REST), rewards, strict=True)]


PART, REST = slice(0, 30), slice(30, None)


def test_losses_are_summed_by_timestep_and_by_bins_of_each_reward() -> None:
    generator = torch.Generator().manual_seed(1)
    losses, t = torch.rand(100, generator=generator), torch.rand(100, generator=generator)
    bins = torch.randint(64, (100, 2), generator=generator)
    keep = torch.rand(100, 2, generator=generator) < 0.7
    losses[7], losses[50], t[3] = math.nan, math.inf, 1.0

    sums, counts = loss_sums(records(losses, t, bins, keep, 64)).tolist()

    expected: dict[str, list[float]] = {name: [] for name in loss_groups(("red", "big"))}
    for n in range(100):
        if not losses[n].isfinite():
            continue
        loss = float(losses[n])
        expected["loss"].append(loss)
        expected[f"loss_by_t/{min(int(10 * t[n]), 9) / 10 + 0.05:.2f}"].append(loss)
        for r, name in enumerate(("red", "big")):
            if keep[n, r]:
                third = "low" if bins[n, r] < 21 else "middle" if bins[n, r] < 42 else "high"
                expected[f"loss_by_reward/{name}/{third}"].append(loss)
    assert counts == [len(found) for found in expected.values()] and min(counts) > 0
    assert sums == pytest.approx([sum(found) for found in expected.values()], rel=1e-12)


@pytest.mark.parametrize(
    ("levels", "thirds"),
    [(2, {0: "low", 1: "high"}), (3, {0: "low", 1: "middle", 2: "high"})],
)
def test_the_lowest_and_the_highest_of_few_bins_are_in_different_thirds(
    levels: int, thirds: dict[int, str]
) -> None:
    for number, third in thirds.items():
        bins = torch.full((40, 1), number)
        sums = loss_sums(records(torch.ones(40), torch.rand(40), bins, bins >= 0, levels))

        counts = dict(zip(loss_groups(["red"]), sums[1].tolist(), strict=True))
        assert counts[f"loss_by_reward/red/{third}"] == 40
        assert sum(counts[f"loss_by_reward/red/{name}"] for name in ("low", "middle", "high")) == 40


def test_without_rewards_losses_are_grouped_by_timestep_only() -> None:
    nothing = torch.zeros(40, 0, dtype=torch.int64)

    sums = loss_sums(records(torch.ones(40), torch.rand(40), nothing, nothing.bool(), 64))

    assert sums.shape == (2, 11) and sums[1, 1:].sum() == 40


def test_a_run_reports_its_loss_by_timestep_and_reward(undisturbed: RunFolder) -> None:
    lines = read_metrics(undisturbed.metrics)

    names = {name for line in lines for name in line}
    losses = {name for name in names if name.startswith("loss")}
    # 96 timesteps of this distribution are seldom near 0 or 1.
    rare = {"loss_by_t/0.05", "loss_by_t/0.95"}
    assert losses | rare == set(loss_groups(("colourfulness", "sharpness")))
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        at = [value for name, value in line.items() if name.startswith("loss_by_t/")]
        assert min(at) <= line["loss"] <= max(at)
        assert line["memory/resident_gib"] > 0.05 and 0 <= line["logging_fraction"] < 1
    # A CPU has no known peak FLOP/s and no NVML.
    assert not names & {"mfu", "gpu/power_watts"}
    board = EventAccumulator(str(undisturbed.tensorboard))
    board.Reload()
    assert set(board.Tags()["scalars"]) == names - {"images", "time"}


def test_inactive_rewards_are_not_reported(training: TrainConfig, tmp_path: Path) -> None:
    conditioning = ConditioningConfig(rewards=("sharpness",))
    train(replace(training, images=16, conditioning=conditioning, ema_weights_at=()), tmp_path)

    names = {name for line in read_metrics(RunFolder(tmp_path).metrics) for name in line}
    assert "loss_by_reward/sharpness/low" in names
    assert not [name for name in names if name.startswith("loss_by_reward/colourfulness")]


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_mfu_is_useful_flops_over_the_peak(
    training: TrainConfig, encoded: Path, tmp_path: Path, micro_batch: int
) -> None:
    """Without captions every step has the same FLOPs."""
    config = replace(
        training, images=16, peak_flops=1e12, ema_weights_at=(),
        conditioning=ConditioningConfig(drop_text=1.0),
        sharding=replace(training.sharding, micro_batch=micro_batch),
    )  # fmt: skip
    shapes = (micro_batch, 3, 32, 32), (0, 384), (2, 64)

    train(config, tmp_path)

    for line in read_metrics(RunFolder(tmp_path).metrics):
        an_image = training_flops(config.model, *shapes) / micro_batch
        assert line["mfu"] * 1e12 == pytest.approx(line["images_per_second"] * an_image, rel=1e-6)


def test_a_negative_peak_is_refused(training: TrainConfig) -> None:
    with pytest.raises(ValueError, match="peak_flops must be above 0, got -1"):
        replace(training, peak_flops=-1.0)


def test_the_time_of_a_report_is_measured_and_included_in_the_rate(
    training: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MetricsWriter.write

    def slow(*given: Any) -> None:
        time.sleep(0.2)
        write(*given)

    monkeypatch.setattr(MetricsWriter, "write", slow)
    train(replace(training, images=24, ema_weights_at=(), checkpoint_every=24), tmp_path)

    first, *others = read_metrics(RunFolder(tmp_path).metrics)
    assert first["logging_fraction"] == 0
    for line in others:
        seconds = 8 / line["images_per_second"]
        assert 0.2 <= line["logging_fraction"] * seconds <= seconds


class Operations(TorchDispatchMode):
    """Counts operations of torch, without views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Counts host syncs: values copied to the host."""

    NAMES = {"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"}
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


def test_reports_are_under_a_hundredth_of_all_operations_and_steps_add_none(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted with the demo's network and interval; the batch size changes no count."""
    with Operations() as operations, HostReads() as reads:
        counted: dict[str, list[tuple[int, int, int]]] = {"add": [], "log": []}

        def count(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*given: Any) -> None:
                before = operations.count, reads.count
                run(*given)
                counted[name].append(
                    (before[0], operations.count - before[0], reads.count - before[1])
                )

            return counting

        for name in counted:
            monkeypatch.setattr(MetricsTracker, name, count(name, getattr(MetricsTracker, name)))
        train(
            replace(
                demo(), data=encoded, compile=False, batch=4, images=12, report_every=12,
                checkpoint_every=12, peak_flops=1e12,
            ),
            tmp_path,
        )  # fmt: skip

    starts, computed, read = zip(*counted["add"], strict=True)
    a_step = min(after - before for before, after in itertools.pairwise(starts))
    ((_, a_report, its_reads),) = counted["log"]
    assert sum(computed) == 0 and sum(read) == 0
    assert 0 < its_reads <= 4
    steps = demo().report_every // demo().batch
    assert 0 < a_report / (steps * a_step) < 0.01
