"""Means between two reports, the wait for data, and the watch over steps that were skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from miro.engine import Engine
from miro.report.metrics import MetricsWriter

T = TypeVar("T")


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


class Meter:
    """Collects the losses of a rank on its device, so that only a report waits for it."""

    def __init__(
        self,
        engine: Engine,
        metrics: MetricsWriter | None,
        report: Callable[[Progress], None],
        suspects: Callable[[int], list[str]],
        images: int,
    ) -> None:
        """metrics: where the first rank writes.

        suspects: gives the names of this rank's samples of the step after so many images.
        """
        self.engine, self.metrics, self.report = engine, metrics, report
        self.suspects = suspects
        self.wait = DataWait(engine.device)
        self._begin(images)

    def _begin(self, images: int) -> None:
        self.start, self.clock = images, time.perf_counter()
        self.marks: list[int] = []
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(self, images: int, losses: list[Tensor], norm: Tensor) -> None:
        """The step after `images` images: the losses (micro-batch,) of each micro-batch."""
        self.marks.append(images)
        self.losses.append(torch.cat(losses))
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
        losses = torch.stack(self.losses).float().cpu()
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
        sums = torch.cat([_sum_and_count(self.losses), _sum_and_count(self.norms)])
        if self.engine.ranks.world > 1:
            dist.all_reduce(sums)
        loss_sum, loss_count, norm_sum, norm_count = sums.tolist()
        seconds = time.perf_counter() - self.clock
        waited = torch.tensor(self.wait.read() / seconds, device=self.engine.device)
        if self.engine.ranks.world > 1:
            # All wait for the slowest of them, though only it waits for data.
            dist.all_reduce(waited, dist.ReduceOp.MAX)
        rate = (images - self.start) / seconds
        progress = Progress(
            images,
            total,
            loss_sum / max(1, loss_count),
            norm_sum / max(1, norm_count),
            rate,
            (total - images) / rate,
            waited.item(),
        )
        if self.metrics is not None:
            values = {
                "loss": progress.loss,
                "gradient_norm": progress.gradient_norm,
                "images_per_second": rate,
                "data_wait": round(progress.data_wait, 4),
            }
            if skipped := self.engine.guard.read()["total"]:
                values["steps_skipped"] = skipped
            self.metrics.write(images, values)
            self.report(progress)
        self._begin(images)


def _sum_and_count(values: list[Tensor]) -> Tensor:
    """(2,) fp64: of those that are finite, as those of a skipped step need not be."""
    numbers = torch.stack(values).double()
    finite = numbers.isfinite()
    return torch.stack((torch.where(finite, numbers, 0.0).sum(), finite.sum().double()))
