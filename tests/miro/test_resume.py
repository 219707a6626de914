"""Runs that are interrupted, killed, damaged or out of disk space resume bit for bit."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.corrupt import flip_a_byte
from helpers.full_disk import fill
from helpers.kill import run_killed_before, run_killed_when

from miro.conditioning import ConditioningConfig
from miro.training import checkpoint
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.metrics import TrainingProgress
from miro.training.metrics_log import read_metrics


def losses(run: RunFolder) -> list[tuple[int, float]]:
    return [(line["images"], line["loss"]) for line in read_metrics(run.metrics)]


def assert_same_run(folder: Path, undisturbed: RunFolder) -> None:
    """Assert equal weights, EMA weights, moments and losses, bit for bit."""
    run = RunFolder(folder)
    assert run.checkpoint(80).is_dir() and not list(run.root.rglob("*.writing"))
    assert [images for images, _ in run.weights_written()] == [40, 96]
    pairs = [(run.checkpoint(96), undisturbed.checkpoint(96))]
    pairs += [(run.weights_at(n), undisturbed.weights_at(n)) for n in (40, 96)]
    for ours, theirs in pairs:
        (tensors, state), (expected, expected_state) = map(checkpoint.load, (ours, theirs))
        assert tensors.keys() == expected.keys() and state == expected_state
        assert [n for n in expected if not torch.equal(tensors[n], expected[n])] == []
    assert losses(run) == losses(undisturbed)


def stop_at(images: int) -> Callable[[TrainingProgress], None]:
    def report(progress: TrainingProgress) -> None:
        if progress.images == images:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("images", [8, 16, 40, 88])
def test_an_interrupted_run_resumes_bit_for_bit(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path, images: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(training, tmp_path, report=stop_at(images))

    train(training, tmp_path)

    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_bf16_run_resumes_bit_for_bit(
    training: TrainConfig, tmp_path: Path, compiled: bool
) -> None:
    """Compiled code must not depend on the step at which a run started."""
    training = replace(training, precision="bf16", compile=compiled)
    train(training, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train(training, tmp_path / "stopped", report=stop_at(56))

    train(training, tmp_path / "stopped")

    assert_same_run(tmp_path / "stopped", RunFolder(tmp_path / "undisturbed"))


SAVED, OLD = "checkpoints/.000000000048.writing", "000000000016"
MOMENTS = {
    "before its first file": ("os.rename", "/.bins.json.partial"),
    "before its configuration": ("os.rename", "/.config.json.partial"),
    "before its metrics": ("os.rename", "/.metrics.jsonl.writing"),
    "before its first checkpoint": ("os.mkdir", "checkpoints/.000000000016.writing"),
    "after the tensors of a checkpoint": ("open", f"{SAVED}/state.json"),
    "before the manifest of a checkpoint": ("open", f"{SAVED}/manifest.json"),
    "before a checkpoint counts": ("os.rename", SAVED),
    "before an old checkpoint is deleted": ("shutil.rmtree", OLD),
    "in the middle of deleting it": ("os.rmdir", OLD),
    "before weights count": ("os.rename", "weights/.000000000040.writing"),
    "between last weights and checkpoint": ("os.mkdir", "checkpoints/.000000000096.writing"),
    "at the very end": ("os.rmdir", "000000000064"),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_killed_run_resumes_bit_for_bit(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path, moment: tuple[str, str]
) -> None:
    assert run_killed_before(training, tmp_path, moment) == -9

    train(training, tmp_path)

    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("saved", ["checkpoints", "weights"])
def test_a_run_killed_during_a_save_resumes_bit_for_bit(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path, saved: str
) -> None:
    def writing() -> bool:
        return any((tmp_path / saved).glob(".*.writing"))

    assert run_killed_when(training, tmp_path, writing) == -9

    train(training, tmp_path)

    assert_same_run(tmp_path, undisturbed)


def test_a_finished_run_is_not_trained_again(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.root, tmp_path / "run")
    reports: list[TrainingProgress] = []

    final = train(training, tmp_path / "run", report=reports.append)

    assert final == RunFolder(tmp_path / "run").weights_at(96) and reports == []
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_damaged_checkpoint_is_logged_and_the_previous_one_is_loaded(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(undisturbed.root, run.root)
    flip_a_byte(run.checkpoint(96) / checkpoint.RANK_FILE.format(0))
    reports: list[TrainingProgress] = []

    train(training, run.root, report=reports.append)

    assert str(run.checkpoint(96)) in caplog.text and "damaged" in caplog.text
    assert reports[0].images == 88
    assert_same_run(run.root, undisturbed)


def test_a_damaged_newer_checkpoint_does_not_cause_a_complete_one_to_be_deleted(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(undisturbed.root, run.root)
    flip_a_byte(run.checkpoint(96) / checkpoint.RANK_FILE.format(0))
    changed = replace(training, checkpoint_every=8, keep_checkpoints=1)

    with pytest.raises(KeyboardInterrupt):
        train(changed, run.root, report=stop_at(96))

    found = checkpoint.open_newest(run.checkpoints)
    assert found is not None and found.state["images"] == 88


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed: 1 here, 0 there"),
        ({"batch": 4}, "batch: 4 here, 8 there"),
        ({"conditioning": ConditioningConfig(drop_all=0.5)}, "conditioning.drop_all: 0.5 here"),
        ({"precision": "bf16"}, "precision: 'bf16' here"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(
    training: TrainConfig, undisturbed: RunFolder, change: dict[str, Any], key: str
) -> None:
    with pytest.raises(ValueError) as error:
        train(replace(training, **{"ema_weights_at": (), **change}), undisturbed.root)

    assert key in str(error.value) and str(undisturbed.root) in str(error.value)


def test_intervals_and_the_path_of_the_data_may_change_on_resume(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(training, tmp_path / "run", report=stop_at(40))
    assert training.data is not None
    shutil.copytree(training.data, tmp_path / "moved")

    changed = replace(training, data=tmp_path / "moved", report_every=32, checkpoint_every=48)
    train(changed, tmp_path / "run")

    ours, _ = checkpoint.load(RunFolder(tmp_path / "run").checkpoint(96))
    theirs, _ = checkpoint.load(undisturbed.checkpoint(96))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_never_refuses_a_folder_with_a_run(
    training: TrainConfig, undisturbed: RunFolder
) -> None:
    with pytest.raises(ValueError, match="has a run already"):
        train(training, undisturbed.root, resume="never")


@pytest.mark.parametrize("left", [0, 200_000])
def test_a_run_stopped_by_a_full_disk_resumes_once_there_is_space(
    training: TrainConfig, undisturbed: RunFolder, small_disk: Path, left: int
) -> None:
    run = RunFolder(small_disk / "run")

    def fill_before_the_second_checkpoint(progress: TrainingProgress) -> None:
        if progress.images == 32:
            while not run.latest.exists():  # The first is still being written in the background.
                time.sleep(0.001)
            fill(small_disk, left)

    with pytest.raises(OSError, match=r"could not write .*make room and resume"):
        train(training, run.root, report=fill_before_the_second_checkpoint)
    found = checkpoint.open_newest(run.checkpoints)
    assert found is not None and found.state["images"] == 16

    (small_disk / "filler").unlink()
    train(training, run.root)
    assert_same_run(run.root, undisturbed)


def test_a_checkpoint_of_another_network_is_logged_and_the_previous_one_is_loaded(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wider = replace(
        training, model=replace(training.model, hidden=48), images=16, ema_weights_at=()
    )
    train(wider, tmp_path / "other")
    run = RunFolder(tmp_path / "run")
    shutil.copytree(undisturbed.root, run.root)
    shutil.rmtree(run.checkpoint(96))
    shutil.copytree(RunFolder(tmp_path / "other").checkpoint(16), run.checkpoint(96))

    train(training, run.root)

    assert f"{run.checkpoint(96)}: the checkpoint is of another network" in caplog.text
    assert_same_run(run.root, undisturbed)


def test_a_run_may_continue_without_a_checkpoint_that_did_not_fit_on_the_disk(
    training: TrainConfig,
    undisturbed: RunFolder,
    small_disk: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = RunFolder(small_disk / "run")

    def fill_for_a_while(progress: TrainingProgress) -> None:
        if progress.images == 32:
            fill(small_disk, left=200_000)
        if progress.images == 72:
            (small_disk / "filler").unlink()

    config = replace(training, on_failed_save="continue", ema_weights_at=())
    train(config, run.root, report=fill_for_a_while)

    assert "could not write" in caplog.text and "the run continues" in caplog.text
    assert [images for images, _ in checkpoint.list_checkpoints(run.checkpoints)] == [80, 96]
    ours, theirs = (checkpoint.load(r.checkpoint(96))[0] for r in (run, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
