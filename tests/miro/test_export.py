"""Export: from a run's weights, or merged from the shards of a checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.multirank import train_multirank

from miro.sampling.export import export
from miro.sampling.pipeline import Pipeline
from miro.training import checkpoint
from miro.training.batch_plan import ShardingConfig
from miro.training.checkpoint import CheckpointError, RunFolder
from miro.training.config import TrainConfig


def test_the_newest_weights_are_exported_and_load_by_themselves(
    undisturbed: RunFolder, tmp_path: Path
) -> None:
    dest = export(undisturbed.root, tmp_path / "model")

    tensors, state = checkpoint.load(dest)
    expected, _ = checkpoint.load(undisturbed.weights_at(96))
    assert state["images"] == 96
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert Pipeline.load(dest).rewards == ("colourfulness", "sharpness")


def test_a_checkpoint_of_several_ranks_is_merged(training: TrainConfig, tmp_path: Path) -> None:
    config = replace(training, sharding=ShardingConfig("3"))
    train_multirank(2, config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    expected, state = checkpoint.load(run.weights_at(96))
    shutil.rmtree(run.weights)

    tensors, found = checkpoint.load(export(run.root, tmp_path / "model", images=96))

    assert found == state and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    Pipeline.load(tmp_path / "model")


def test_invalid_exports_are_rejected(undisturbed: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights at 48 images; choose one of 40, 80, 96"):
        export(undisturbed.root, tmp_path / "model", images=48)
    with pytest.raises(CheckpointError, match="is not a run"):
        export(tmp_path, tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        export(undisturbed.root, tmp_path / "model")
