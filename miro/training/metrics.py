"""What a run reports, gathered between two reports without a cost to the steps, and the watch over
steps that were skipped.
"""

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
from miro.training.telemetry import Nvml, memory

T = TypeVar("T")

RANGES = 10
"""Of t, equal, in which the mean loss is reported."""
THIRDS = ("low", "middle", "high")
"""Of a reward's bins."""


@dataclass(frozen=True)
class Progress:
    """What a report says."""

    images: int
    total: int
    loss: float
    gradient_norm: float
    images_per_second: float
    seconds_left: float
    data_wait: float
    """Share of the time since the last report in which the device waited for data, 0 to 1."""
    mfu: float | None
    """Share of the devices' peak that useful FLOPs came to; None where the peak is not known."""


class StepRecord(NamedTuple):
    """What is kept of a micro-batch of B visits until the report: what there is, nothing new."""

    losses: Tensor  # (B,)
    t: Tensor  # (B,)
    rewards: RewardCond
    flops: float  # useful ones of its forward and backward pass, by miro.training.flops


def loss_groups(rewards: Sequence[str]) -> list[str]:
    """The names of the mean losses that are reported: of all samples, by their t, each range by its
    middle, and by the bin of each reward, of the samples that were told it.
    """
    ranges = [f"loss_at/{(k + 0.5) / RANGES:.2f}" for k in range(RANGES)]
    return ["loss", *ranges, *(f"loss_by/{name}/{third}" for name in rewards for third in THIRDS)]


def loss_sums(seen: Sequence[StepRecord]) -> Tensor:
    """(2, groups) fp64: sum and number of the finite losses in each of the `loss_groups`.

    By a product with the groups' members, which unlike adding up by index is the same twice on a
    GPU, and waits for nothing.
    """
    losses, t = (torch.cat([getattr(s, name) for s in seen]) for name in ("losses", "t"))
    bins, keep = (torch.cat([getattr(s.rewards, name) for s in seen]) for name in ("bins", "keep"))
    highest = seen[0].rewards.levels.numel() - 1
    at = (t * RANGES).long().clamp(max=RANGES - 1)
    by = (len(THIRDS) * bins // highest).clamp(max=len(THIRDS) - 1)
    numbers = torch.arange(RANGES, device=t.device)
    told = (by[..., None] == numbers[: len(THIRDS)]) & keep[..., None]
    finite = losses.isfinite()
    members = torch.cat((finite[:, None], at[:, None] == numbers, told.flatten(1)), 1)
    values = torch.stack((torch.where(finite, losses, 0.0).double(), finite.double()))
    return values @ members.double()


class DataWait:
    """Seconds in which the device had nothing to do because the next visit was not made yet.

    On a GPU the host runs ahead, and that it waits for data costs nothing while the device is busy.
    So there two events are recorded round each wait: the time between them on the device is what it
    was idle.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def timed(self, endless: Iterator[T]) -> Iterator[T]:
        """The same items; what each is waited for is counted."""
        while True:
            started, before = time.perf_counter(), self._mark()
            item = next(endless)
            self._seconds += time.perf_counter() - started
            if before is not None and (after := self._mark()) is not None:
                self._waits.append((before, after))
            yield item

    def _mark(self) -> torch.cuda.Event | None:
        if not self._events:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """The seconds since it was read last. On a GPU it waits for the last event."""
        seconds = self._seconds
        if self._waits:
            self._waits[-1][1].synchronize()
            seconds = sum(before.elapsed_time(after) for before, after in self._waits) / 1000
        self._waits, self._seconds = [], 0.0
        return seconds


class MetricsTracker:
    """Collects the losses of a rank on its device, so that only a report waits for it."""

    def __init__(
        self,
        engine: Engine,
        metrics: MetricsWriter | None,
        report: Callable[[Progress], None],
        suspects: Callable[[int], list[str]],
        images: int,
        *,
        rewards: Sequence[str],
        peak: float | None,
    ) -> None:
        """metrics: where the first rank writes.

        suspects: gives the names of this rank's samples of the step after so many images.
        rewards: names, in the order of the visits. peak: FLOP/s of this rank's device, if known.
        """
        self.engine, self.metrics, self.report = engine, metrics, report
        self.suspects, self.groups, self.peak = suspects, loss_groups(rewards), peak
        self.wait = DataWait(engine.device)
        self.nvml = None if metrics is None else Nvml(engine.device)
        self.spent = 0.0
        self._begin(images, time.perf_counter())

    def _begin(self, images: int, clock: float) -> None:
        self.start, self.clock = images, clock
        self.marks: list[int] = []
        self.seen: list[StepRecord] = []
        self.norms: list[Tensor] = []

    def add(self, images: int, seen: Sequence[StepRecord], norm: Tensor) -> None:
        """The step after `images` images: its micro-batches."""
        self.marks.append(images)
        self.seen.extend(seen)
        self.norms.append(norm)

    def check(self, images: int) -> bool:
        """Whether the last step was taken, so that the state is worth saving.

        Raises:
            FloatingPointError: too many steps in a row were skipped; names the samples.
        """
        guard, most = self.engine.guard.read(), self.engine.config.skips
        if guard["longest"] >= most:
            raise FloatingPointError(
                f"{most} steps in a row were skipped before {images} images: their gradients were "
                f"not numbers, or above {self.engine.config.skip_above} times the mean norm of "
                f"{guard['mean']:.3g}. The weights are as before, and the last checkpoint is good. "
                f"Their samples: {self._named()}. Take these out of the data, or train in another "
                "folder with a lower optimizer.learning_rate"
            )
        return guard["in_row"] == 0

    def _named(self) -> str:
        """The samples with the worst losses of all ranks since the last report."""
        losses = torch.cat([seen.losses for seen in self.seen]).view(len(self.marks), -1).cpu()
        worst = torch.where(losses.isfinite(), losses, torch.inf)
        found = []
        for place in worst.flatten().argsort(descending=True, stable=True)[:4].tolist():
            step, sample = divmod(place, losses.shape[1])
            key = self.suspects(self.marks[step])[sample]
            found.append(f"{key} (loss {losses[step, sample]:.3g})")
        if self.engine.ranks.world == 1:
            return ", ".join(found)
        told: list[list[str]] = [[] for _ in range(self.engine.ranks.world)]
        dist.all_gather_object(told, found)
        return ", ".join(name for names in told for name in names)

    def tell(self, images: int, total: int) -> None:
        """Report the steps since the last one; all ranks call it together."""
        self.check(images)
        # From here on the device idles: what follows is what a report costs.
        now = time.perf_counter()
        seconds = now - self.clock
        means, most = self._means(seconds), self._most(seconds)
        rate = (images - self.start) / seconds
        values = {
            "loss": 0.0,
            "gradient_norm": 0.0,
            "images_per_second": rate,
            "reporting": round(self.spent / seconds, 6),
            **most,
            **means,
        }
        if self.metrics is not None:
            if skipped := self.engine.guard.read()["total"]:
                values["steps_skipped"] = skipped
            if self.nvml is not None:
                values |= self.nvml.read()
            self.metrics.write(images, values)
            self.report(
                Progress(
                    images,
                    total,
                    values["loss"],
                    values["gradient_norm"],
                    rate,
                    (total - images) / rate,
                    values["data_wait"],
                    means.get("mfu"),
                )
            )
        self.spent = time.perf_counter() - now
        self._begin(images, now)

    def _means(self, seconds: float) -> dict[str, float]:
        """Over all ranks, of what there was any of: each a sum over a number."""
        flops = sum(seen.flops for seen in self.seen)
        used = (flops / self.peak, seconds) if self.peak else (0.0, 0.0)
        device = self.engine.device
        columns = (
            loss_sums(self.seen),
            _sum_and_count(self.norms),
            torch.tensor(used, dtype=torch.float64, device=device)[:, None],
        )
        sums = torch.cat(columns, 1)
        if self.engine.ranks.world > 1:
            dist.all_reduce(sums)
        names = (*self.groups, "gradient_norm", "mfu")
        rows = zip(names, *sums.tolist(), strict=True)
        return {name: total / count for name, total, count in rows if count}

    def _most(self, seconds: float) -> dict[str, float]:
        """The highest of all ranks: all wait for the slowest, though only it waits for data."""
        device = self.engine.device
        mine = {"data_wait": self.wait.read() / seconds, **memory(device)}
        most = torch.tensor(list(mine.values()), device=device)
        if self.engine.ranks.world > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return {name: round(value, 4) for name, value in zip(mine, most.tolist(), strict=True)}


def _sum_and_count(values: list[Tensor]) -> Tensor:
    """(2, 1) fp64: of those that are finite, as those of a skipped step need not be."""
    numbers = torch.stack(values).double()
    finite = numbers.isfinite()
    return torch.stack((torch.where(finite, numbers, 0.0).sum(), finite.sum().double()))[:, None]
