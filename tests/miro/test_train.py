"""Training runs: their files, their data, and refused configurations."""

import json
import math
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from miro.conditioning import ConditioningConfig
from miro.data.reader import EncodedDataset
from miro.data.shards import Manifest, read_shard_scores, scores_path, write_scores
from miro.training import checkpoint
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.metrics import TrainingProgress
from miro.training.metrics_log import read_metrics
from miro.training.optimizer import OptimizerConfig

Weights = dict[str, Tensor]


def test_a_run_writes_its_configuration_bins_versions_and_metrics(undisturbed: RunFolder) -> None:
    assert json.loads(undisturbed.config.read_text())["images"] == 96
    assert set(json.loads(undisturbed.bins.read_text())["edges"]) == {"colourfulness", "sharpness"}
    assert json.loads(undisturbed.versions.read_text())["torch"]
    assert [line["images"] for line in read_metrics(undisturbed.metrics)] == list(range(8, 97, 8))
    for line in read_metrics(undisturbed.metrics):
        assert all(math.isfinite(line[name]) for name in ("loss", "gradient_norm"))
        assert line["images_per_second"] > 0
    assert list(undisturbed.tensorboard.glob("events.*"))


def test_saved_weights_have_all_that_sampling_needs(undisturbed: RunFolder, encoded: Path) -> None:
    tensors, state = checkpoint.load(undisturbed.weights_at(96))

    assert state["images"] == 96 and state["config"]["model"]["channels"] == 32
    assert state["encoding"] == Manifest.read(encoded).encoding
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_training_reduces_the_loss(training: TrainConfig, tmp_path: Path) -> None:
    reports: list[TrainingProgress] = []

    longer = replace(
        training, images=960, report_every=240, checkpoint_every=960, ema_weights_at=()
    )
    final = train(longer, tmp_path, report=reports.append)

    assert [report.images for report in reports] == [240, 480, 720, 960]
    assert reports[-1].loss < 0.75 * reports[0].loss
    assert [report.total for report in reports] == [960] * 4
    assert reports[0].seconds_left > 0 and reports[-1].seconds_left == 0
    assert final == RunFolder(tmp_path).weights_at(960)


def rescored(source: Path, dest: Path, change: Callable[[dict], dict]) -> Path:
    """A copy of an encoded dataset with other scores."""
    shutil.copytree(source, dest)
    manifest = Manifest.read(dest)
    for shard in manifest.shards:
        path = scores_path(dest, shard)
        keys, captions, columns = read_shard_scores(path)
        columns = change(dict(columns))
        write_scores(path, keys, captions, columns)
    replace(manifest, rewards=tuple(columns)).write(dest)
    return dest


def test_resuming_on_other_scores_is_refused(
    training: TrainConfig, undisturbed: RunFolder, encoded: Path, tmp_path: Path
) -> None:
    data = rescored(encoded, tmp_path / "data", lambda c: {n: v * 2 for n, v in c.items()})

    with pytest.raises(ValueError, match="trained on other scores"):
        train(replace(training, data=data), undisturbed.root)


def initial_and_final(training: TrainConfig, folder: Path) -> tuple[Weights, Weights]:
    train(
        replace(training, images=32, checkpoint_every=8, keep_checkpoints=9, ema_weights_at=()),
        folder,
    )
    run = RunFolder(folder)
    return checkpoint.load(run.checkpoint(8))[0], checkpoint.load(run.weights_at(32))[0]


def test_baseline_specialist_and_miro_start_from_the_same_weights(
    training: TrainConfig, tmp_path: Path
) -> None:
    runs = {}
    for name, rewards in (("baseline", ()), ("specialist", ("sharpness",)), ("miro", None)):
        conditioning = ConditioningConfig(rewards=rewards, drop_all=0.0)
        runs[name] = initial_and_final(
            replace(training, conditioning=conditioning), tmp_path / name
        )

    shapes = [{n: w.shape for n, w in final.items()} for _, final in runs.values()]
    assert shapes[0] == shapes[1] == shapes[2]
    # Reward conditioning is zero-initialized, so after one step only reward weights can differ.
    for first, _ in runs.values():
        differing = {n for n in first if not torch.equal(first[n], runs["miro"][0][n])}
        assert not {n for n in differing if "master/patches" in n}
    used = {name: final["table.out"].abs().amax((1, 2)) > 0 for name, (_, final) in runs.items()}
    assert used["baseline"].tolist() == [False, False]
    assert used["specialist"].tolist() == [False, True]
    assert used["miro"].tolist() == [True, True]
    assert not torch.equal(runs["miro"][1]["out.weight"], runs["baseline"][1]["out.weight"])


def test_data_without_rewards_trains_a_baseline(
    training: TrainConfig, encoded: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoded, tmp_path / "data")
    replace(Manifest.read(encoded), rewards=()).write(tmp_path / "data")

    final = train(replace(training, data=tmp_path / "data"), tmp_path / "run")

    assert checkpoint.load(final)[0]["table.out"].shape[0] == 0


def test_a_reward_without_scores_can_be_excluded_as_the_error_says(
    training: TrainConfig, encoded: Path, tmp_path: Path
) -> None:
    data = rescored(
        encoded, tmp_path / "data", lambda c: c | {"sharpness": c["sharpness"] * float("nan")}
    )
    training = replace(training, data=data)

    with pytest.raises(ValueError, match=r"'sharpness' has no known score.*conditioning\.rewards"):
        train(training, tmp_path / "all")

    conditioning = ConditioningConfig(rewards=("colourfulness",))
    final = train(replace(training, conditioning=conditioning), tmp_path / "run")
    assert checkpoint.load(final)[0]["table.out"].shape[0] == 2


def test_a_baseline_resumes_bit_for_bit_after_an_inactive_reward_was_scored(
    training: TrainConfig, encoded: Path, tmp_path: Path
) -> None:
    """reward_slots gives it the parameters of the reward; inactive, they learn nothing."""
    early = rescored(encoded, tmp_path / "early", lambda c: {"sharpness": c["sharpness"]})
    slots = ConditioningConfig(rewards=(), reward_slots=("colourfulness", "sharpness"))
    training = replace(training, conditioning=slots, images=32, ema_weights_at=())

    whole = train(replace(training, data=encoded), tmp_path / "whole")
    train(replace(training, data=early), tmp_path / "halves")
    shutil.rmtree(RunFolder(tmp_path / "halves").weights_at(32))
    shutil.rmtree(RunFolder(tmp_path / "halves").checkpoint(32))
    again = train(replace(training, data=encoded), tmp_path / "halves")

    expected, found = checkpoint.load(whole)[0], checkpoint.load(again)[0]
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert expected["table.out"].shape[0] == 2


def test_an_unknown_reward_is_refused_before_anything_is_written(
    training: TrainConfig, tmp_path: Path
) -> None:
    conditioning = ConditioningConfig(rewards=("sharpnes",))

    with pytest.raises(ValueError, match="'sharpnes'.*did you mean 'sharpness'"):
        train(replace(training, conditioning=conditioning), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_needs_data(training: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data is not set.*--data"):
        train(replace(training, data=None), tmp_path)


@pytest.mark.parametrize("report_every", [8, 96])
def test_a_diverged_run_stops_and_its_checkpoints_stay_finite(
    training: TrainConfig, tmp_path: Path, report_every: int
) -> None:
    training = replace(
        training, optimizer=OptimizerConfig(learning_rate=1e18), report_every=report_every,
        checkpoint_every=8, ema_weights_at=(),
    )  # fmt: skip

    with pytest.raises(FloatingPointError, match="learning_rate"):
        train(training, tmp_path)

    run = RunFolder(tmp_path)
    found = checkpoint.open_newest(run.checkpoints)
    assert found is not None and found.state["images"] < 96
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(found.folder)[0].values())
    assert run.weights_written() == []
    assert all(math.isfinite(line["loss"]) for line in read_metrics(run.metrics))


def with_nan_sample(source: Path, dest: Path, sample: int) -> str:
    """Copy an encoded dataset, set a latent of `sample` to NaN, and return the sample's key."""
    shutil.copytree(source, dest)
    key = EncodedDataset(dest).keys[sample]
    for path in sorted((dest / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        if (offset := offsets.get(f"{key}.latent.npy")) is not None:
            with open(path, "r+b") as file:
                file.seek(offset + 128)  # past the .npy header
                file.write(np.array([np.nan], np.float16).tobytes())
            return key
    raise AssertionError(key)


def test_only_the_steps_with_a_nan_sample_are_skipped(
    training: TrainConfig, encoded: Path, tmp_path: Path
) -> None:
    with_nan_sample(encoded, tmp_path / "data", 5)

    final = train(replace(training, data=tmp_path / "data", ema_weights_at=()), tmp_path / "run")

    lines = read_metrics(RunFolder(tmp_path / "run").metrics)
    # 64 samples, 96 images: each is used once or twice.
    assert lines[-1]["skipped_steps"] in (1, 2)
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(final)[0].values())


def test_too_many_skipped_steps_stop_the_run_and_name_the_samples(
    training: TrainConfig, encoded: Path, tmp_path: Path
) -> None:
    key = with_nan_sample(encoded, tmp_path / "data", 5)
    optimizer = replace(training.optimizer, max_skipped_steps=1)
    config = replace(training, data=tmp_path / "data", ema_weights_at=(), optimizer=optimizer)

    with pytest.raises(FloatingPointError, match=rf"Their samples: {key} \(loss nan\)"):
        train(config, tmp_path / "run")

    found = checkpoint.open_newest(RunFolder(tmp_path / "run").checkpoints)
    assert found is None or found.state["gradient_clipper"]["total"] == 0
