"""The time a run waits for data: measured, written and shown."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miro.cli.train import progress_detail
from miro.data.reader import EncodedDataset
from miro.training import metrics
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.metrics import DataWait, TrainingProgress
from miro.training.metrics_log import read_metrics


class Clock:
    """A fake clock that moves when `now` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


def test_a_loader_much_slower_than_the_step_is_reported(
    training: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = EncodedDataset.latent

    def slow(self: EncodedDataset, sample: int):
        time.sleep(0.1)
        return read(self, sample)

    monkeypatch.setattr(EncodedDataset, "latent", slow)

    train(replace(training, images=24, report_every=8, ema_weights_at=()), tmp_path)

    # Without the first report, whose first batch could not be prefetched.
    waits = [line["data_wait"] for line in read_metrics(RunFolder(tmp_path).metrics)][1:]
    assert len(waits) == 2 and all(0.5 < share <= 1 for share in waits)


def test_only_the_wait_for_a_batch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def loader() -> Iterator[int]:
        for number in itertools.count():
            clock.now += 0.25
            yield number

    wait = DataWait(torch.device("cpu"))
    batches = wait.timed(loader())
    for _ in range(3):
        next(batches)
        clock.now += 7.0  # a step

    assert wait.read() == pytest.approx(0.75)
    assert wait.read() == 0.0


@pytest.mark.parametrize(
    ("fraction", "message"), [(0.0, ""), (0.02, ""), (0.021, "2% waiting"), (0.5, "50% waiting")]
)
def test_the_screen_shows_a_wait_above_two_percent(fraction: float, message: str) -> None:
    progress = TrainingProgress(
        images=1,
        total=2,
        loss=0.5,
        gradient_norm=1.0,
        images_per_second=10.0,
        seconds_left=1.0,
        data_wait=fraction,
        skipped=0,
        mfu=None,
    )

    shown = progress_detail(progress)

    assert (message in shown) and ("waiting" in shown) == bool(message)
