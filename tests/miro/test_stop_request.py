"""`miro train` told to stop by a signal: it saves at any moment, and the next call resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from miro.data.npy import npy_bytes, npy_view
from miro.data.reader import LATENT
from miro.data.shards import Manifest, shard_path, write_shard
from miro.sources.tar import iterate_shard
from miro.training import checkpoint
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.metrics import TrainingProgress
from miro.utils.stop_request import EXIT_STOPPED, STOPPED_FILE, Stopped

WORDS = (
    "demo images=160000 batch=8 threads=1 precision=fp32 compile=False report_every=8 "
    "checkpoint_every=80000 model.channels=32 model.depth=1 model.heads=2 model.hidden=32"
).split()


def start(training: TrainConfig, run: Path, **environment: str) -> subprocess.Popen[str]:
    assert training.data is not None
    return subprocess.Popen(
        [sys.executable, "-m", "miro.cli", "train", *WORDS, "--run", run, "--data", training.data],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.01)


def wait_for_a_report(run: Path) -> None:
    metrics = RunFolder(run).metrics
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)


def listens(process: int) -> bool:
    """Whether the process has a handler of SIGTERM."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def saved(run: Path) -> int:
    found = checkpoint.open_newest(RunFolder(run).checkpoints)
    return found.state["images"] if found else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes_from_there(
    training: TrainConfig, tmp_path: Path, number: int
) -> None:
    process = start(training, tmp_path)
    wait_for_a_report(tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)

    assert process.returncode == EXIT_STOPPED, output
    images = saved(tmp_path)
    assert images > 0 and f"{images:,} images" in " ".join(output.split())


def test_a_signal_before_torch_is_imported_stops_the_run_after_its_first_step(
    training: TrainConfig, tmp_path: Path
) -> None:
    process = start(training, tmp_path)
    wait_until(lambda: listens(process.pid))
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.terminate()
    output, _ = process.communicate(timeout=600)

    assert process.returncode == EXIT_STOPPED, output
    assert saved(tmp_path) == 8


def test_a_second_ctrl_c_leaves_at_once(training: TrainConfig, tmp_path: Path) -> None:
    process = start(training, tmp_path)
    assert process.stdout is not None
    wait_until(lambda: listens(process.pid))
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again leaves at once" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)

    assert process.returncode == 130, output
    assert saved(tmp_path) == 0 and "from its last checkpoint" in " ".join(output.split())


def test_a_rank_of_a_launch_script_creates_the_file_and_exits_with_0(
    training: TrainConfig, tmp_path: Path
) -> None:
    file = tmp_path / "stopped"
    process = start(training, tmp_path / "run", **{STOPPED_FILE: str(file)})
    wait_for_a_report(tmp_path / "run")
    process.terminate()
    output, _ = process.communicate(timeout=600)

    assert process.returncode == 0 and file.exists(), output


@pytest.fixture
def half_nan(training: TrainConfig, tmp_path: Path) -> Path:
    """The dataset with a NaN in the latents of half the samples."""
    folder = tmp_path / "half_nan"
    assert training.data is not None
    manifest = Manifest.read(training.data)
    shards = []
    for shard in manifest.shards:
        samples = []
        for n, (key, members) in enumerate(iterate_shard(shard_path(training.data, shard))):
            latent = np.array(npy_view(members[LATENT]))
            latent[:] = np.nan if n % 2 else latent
            samples.append((key, {**members, LATENT: npy_bytes(latent)}))
        shards.append(write_shard(shard_path(folder, shard), samples))
    for path in (training.data / "scores").iterdir():
        (folder / "scores").mkdir(exist_ok=True)
        (folder / "scores" / path.name).write_bytes(path.read_bytes())
    replace(manifest, shards=tuple(shards)).write(folder)
    return folder


def test_a_run_is_saved_also_after_a_skipped_step(
    training: TrainConfig, half_nan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is skipped here: the state of the weights is as before, and is saved."""
    optimizer = replace(training.optimizer, max_skipped_steps=100)
    config = replace(training, data=half_nan, optimizer=optimizer, ema_weights_at=())
    reports: list[int] = []

    def stop(progress: TrainingProgress) -> None:
        reports.append(progress.skipped)
        if progress.images == 40:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="48 images"):
        train(config, tmp_path / "run", report=stop)
    assert saved(tmp_path / "run") == 48 and reports[-1] > 0

    train(config, tmp_path / "run")
    assert saved(tmp_path / "run") == 96
