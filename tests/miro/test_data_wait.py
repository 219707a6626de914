"""The time a run waits for its data, as it is measured, written and shown."""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miro.checkpoint import RunFolder
from miro.cli_train import train as miro_train
from miro.data.encoded import EncodedDataset
from miro.meter import DataWait
from miro.presets import TrainConfig
from miro.report.metrics import read_metrics
from miro.train import train


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Reading a sample's latent takes so long, as from a slow disk."""
    read = EncodedDataset.latent

    def wait(self: EncodedDataset, sample: int):
        time.sleep(seconds)
        return read(self, sample)

    monkeypatch.setattr(EncodedDataset, "latent", wait)


def waits(folder: Path) -> list[float]:
    """The first report is left out: its first batch could not be made ahead."""
    return [line["data_wait"] for line in read_metrics(RunFolder(folder).metrics)][1:]


def test_a_loader_slower_than_the_step_is_told(
    training: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 0.02)

    train(replace(training, images=48, report_every=16, weights_at=()), tmp_path)

    assert all(0.5 < share <= 1 for share in waits(tmp_path))


def test_a_loader_quicker_than_the_step_is_hidden_behind_it(
    training: TrainConfig, tmp_path: Path
) -> None:
    larger = replace(training.model, channels=192, depth=8, hidden=512)

    train(replace(training, model=larger, images=96, report_every=16, weights_at=()), tmp_path)

    # Not the highest: other processes of the machine may take a core away.
    assert statistics.median(waits(tmp_path)) < 0.02


def test_what_is_done_between_two_visits_is_no_wait() -> None:
    wait = DataWait(torch.device("cpu"))
    visits = wait.timed(iter(range(9)))

    for _ in range(3):
        next(visits)
        time.sleep(0.02)

    assert wait.read() < 0.01
    assert wait.read() == 0.0


@pytest.mark.parametrize("seconds", [0.02, 0.0])
def test_miro_train_shows_a_wait_that_matters(
    training: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
) -> None:
    slow(monkeypatch, seconds)

    miro_train(
        f"demo --run {tmp_path} --data {training.data} images=32 batch=8 report_every=16 "
        "checkpoint_every=32 compile=False precision=fp32 model.depth=3".split()
    )

    last = capsys.readouterr().err.splitlines()
    assert any("% waiting for data" in line for line in last) == (seconds > 0)
