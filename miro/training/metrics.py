"""Metrics between two reports, gathered without host syncs, and the check for skipped steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from miro.model.transformer import RewardCond
from miro.training.engine import Engine
from miro.training.metrics_log import MetricsWriter
from miro.training.telemetry import Nvml, memory_stats

T = TypeVar("T")

TIMESTEP_BINS = 10  # equal intervals of t whose mean loss is reported
THIRDS = ("low", "middle", "high")  # of a reward's quantile bins


@dataclass(frozen=True)
class TrainingProgress:
    """The numbers of a report that the screen shows."""

    images: int
    total: int
    loss: float
    gradient_norm: float
    images_per_second: float
    seconds_left: float
    data_wait: float
    """Fraction of the time since the last report in which the device waited for data."""
    skipped: int
    """Steps of the whole run that were skipped because of their gradients."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None if the device's peak is unknown."""


class StepRecord(NamedTuple):
    """What a micro-batch of B samples leaves on the device for the next report; no new tensors."""

    losses: Tensor  # (B,)
    t: Tensor  # (B,)
    rewards: RewardCond
    flops: float  # of its forward and backward pass, by miro.training.flops


def loss_groups(rewards: Sequence[str]) -> list[str]:
    """Name the reported mean losses: of all samples, by timestep, and by third of a reward's bins.

    A timestep's name has the middle of its interval. A reward's losses are of the samples whose
    reward was not dropped.
    """
    timesteps = [f"loss_by_t/{(k + 0.5) / TIMESTEP_BINS:.2f}" for k in range(TIMESTEP_BINS)]
    by_reward = [f"loss_by_reward/{name}/{third}" for name in rewards for third in THIRDS]
    return ["loss", *timesteps, *by_reward]


def loss_sums(records: Sequence[StepRecord]) -> Tensor:
    """Return (2, groups) fp64: sum and count of the finite losses of each of `loss_groups`.

    A matrix product with the groups' masks: unlike scatter-add it is deterministic on a GPU and
    needs no host sync.
    """
    losses, t = (torch.cat([getattr(r, name) for r in records]) for name in ("losses", "t"))
    bins, keep = (
        torch.cat([getattr(r.rewards, name) for r in records]) for name in ("bins", "keep")
    )
    highest = records[0].rewards.levels.numel() - 1
    timestep = (t * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1)
    third = (len(THIRDS) * bins // highest).clamp(max=len(THIRDS) - 1)
    numbers = torch.arange(TIMESTEP_BINS, device=t.device)
    in_third = (third[..., None] == numbers[: len(THIRDS)]) & keep[..., None]
    finite = losses.isfinite()
    masks = torch.cat((finite[:, None], timestep[:, None] == numbers, in_third.flatten(1)), 1)
    values = torch.stack((torch.where(finite, losses, 0.0).double(), finite.double()))
    return values @ masks.double()


class DataWait:
    """Seconds in which the device idled because the next batch was not ready.

    On a GPU the host runs ahead of the device, and a wait for data costs nothing while kernels are
    queued. So CUDA events are recorded around each wait, and the device time between them counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._use_events = device.type == "cuda"
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Iterate over an endless iterator and time the wait for each item."""
        while True:
            started, before = time.perf_counter(), self._record_event()
            item = next(batches)
            self._seconds += time.perf_counter() - started
            if before is not None and (after := self._record_event()) is not None:
                self._waits.append((before, after))
            yield item

    def _record_event(self) -> torch.cuda.Event | None:
        if not self._use_events:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Return the seconds since the last call; on a GPU this waits for the last event."""
        seconds = self._seconds
        if self._waits:
            self._waits[-1][1].synchronize()
            seconds = sum(before.elapsed_time(after) for before, after in self._waits) / 1000
        self._waits, self._seconds = [], 0.0
        return seconds


class MetricsTracker:
    """Collects losses on the device, so that only a report syncs with it.

    Args:
        engine: of this rank.
        metrics: of rank 0, None on other ranks.
        report: called on rank 0 at each report.
        sample_keys: maps the images before a step to the keys of this rank's samples in it.
        images: trained on so far.
        rewards: names, in the order of the batches' columns.
        peak: FLOP/s of the device, None if unknown.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: MetricsWriter | None,
        report: Callable[[TrainingProgress], None],
        sample_keys: Callable[[int], list[str]],
        images: int,
        *,
        rewards: Sequence[str],
        peak: float | None,
    ) -> None:
        self.engine, self.metrics, self.report = engine, metrics, report
        self.sample_keys, self.groups, self.peak = sample_keys, loss_groups(rewards), peak
        self.data_wait = DataWait(engine.device)
        self.nvml = None if metrics is None else Nvml(engine.device)
        self.logging_seconds = 0.0
        self._reset(images, time.perf_counter())

    def _reset(self, images: int, clock: float) -> None:
        self.start, self.clock = images, clock
        self.step_starts: list[int] = []
        self.records: list[StepRecord] = []
        self.norms: list[Tensor] = []

    def add(self, images: int, records: Sequence[StepRecord], norm: Tensor) -> None:
        """Add the micro-batches and gradient norm of the step after `images` images."""
        self.step_starts.append(images)
        self.records.extend(records)
        self.norms.append(norm)

    def check_skipped(self, images: int) -> None:
        """Check the number of steps that were skipped in a row.

        Raises:
            FloatingPointError: too many steps in a row were skipped; names the samples.
        """
        counters, config = self.engine.gradient_clipper.state_dict(), self.engine.config
        if counters["longest"] >= config.max_skipped_steps:
            raise FloatingPointError(
                f"{config.max_skipped_steps} steps in a row were skipped before {images} images: "
                "their gradients were not finite, or their norm exceeded "
                f"{config.skip_threshold} times the mean norm of {counters['mean']:.3g}. The "
                "weights are as before these steps. "
                f"Their samples: {self._worst_samples()}. Remove these from the data, or train in "
                "another folder with a lower optimizer.learning_rate"
            )

    def _worst_samples(self) -> str:
        """The samples with the highest losses of all ranks since the last report."""
        losses = torch.cat([r.losses for r in self.records]).view(len(self.step_starts), -1).cpu()
        ranked = torch.where(losses.isfinite(), losses, torch.inf)
        found = []
        for index in ranked.flatten().argsort(descending=True, stable=True)[:4].tolist():
            step, sample = divmod(index, losses.shape[1])
            key = self.sample_keys(self.step_starts[step])[sample]
            found.append(f"{key} (loss {losses[step, sample]:.3g})")
        if self.engine.env.world == 1:
            return ", ".join(found)
        gathered: list[list[str]] = [[] for _ in range(self.engine.env.world)]
        dist.all_gather_object(gathered, found)
        return ", ".join(name for names in gathered for name in names)

    def log(self, images: int, total: int) -> None:
        """Report the steps since the last call; a collective of all ranks."""
        self.check_skipped(images)
        # check_skipped synced with the device, which idles from here on: the cost of a report.
        now = time.perf_counter()
        seconds = now - self.clock
        means, maxima = self._means(seconds), self._maxima(seconds)
        rate = (images - self.start) / seconds
        values = {
            "loss": 0.0,
            "gradient_norm": 0.0,
            "images_per_second": rate,
            "logging_fraction": round(self.logging_seconds / seconds, 6),
            **maxima,
            **means,
        }
        if self.metrics is not None:
            skipped = int(self.engine.gradient_clipper.state_dict()["total"])
            if skipped:
                values["skipped_steps"] = skipped
            if self.nvml is not None:
                values |= self.nvml.read()
            self.metrics.write(images, values)
            self.report(
                TrainingProgress(
                    images,
                    total,
                    values["loss"],
                    values["gradient_norm"],
                    rate,
                    (total - images) / rate,
                    values["data_wait"],
                    skipped,
                    means.get("mfu"),
                )
            )
        self.logging_seconds = time.perf_counter() - now
        self._reset(images, now)

    def _means(self, seconds: float) -> dict[str, float]:
        """Means over all ranks: all-reduced sums over counts, without empty groups."""
        flops = sum(record.flops for record in self.records)
        utilisation = (flops / self.peak, seconds) if self.peak else (0.0, 0.0)
        device = self.engine.device
        columns = (
            loss_sums(self.records),
            _sum_and_count(self.norms),
            torch.tensor(utilisation, dtype=torch.float64, device=device)[:, None],
        )
        sums = torch.cat(columns, 1)
        if self.engine.env.world > 1:
            dist.all_reduce(sums)
        names = (*self.groups, "gradient_norm", "mfu")
        rows = zip(names, *sums.tolist(), strict=True)
        return {name: total / count for name, total, count in rows if count}

    def _maxima(self, seconds: float) -> dict[str, float]:
        """Maxima over all ranks: all wait for the slowest, but only that one waits for data."""
        device = self.engine.device
        local = {"data_wait": self.data_wait.read() / seconds, **memory_stats(device)}
        maxima = torch.tensor(list(local.values()), device=device)
        if self.engine.env.world > 1:
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return {name: round(value, 4) for name, value in zip(local, maxima.tolist(), strict=True)}


def _sum_and_count(values: list[Tensor]) -> Tensor:
    """(2, 1) fp64, of the finite values: the norm of a skipped step may be NaN."""
    stacked = torch.stack(values).double()
    finite = stacked.isfinite()
    return torch.stack((torch.where(finite, stacked, 0.0).sum(), finite.sum().double()))[:, None]
