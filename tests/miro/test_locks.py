"""Two processes never write one folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from openmoji.demo import DemoConfig, run_demo

from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.presets import ModelConfig
from miro.utils.locks import exclusive_lock

MODEL = ModelConfig(channels=32, depth=1, heads=1, hidden=32, patch=8)


def test_a_folder_is_free_again_when_its_writer_ends(tmp_path: Path):
    for _ in range(2):
        with exclusive_lock(tmp_path / "new"):
            assert (tmp_path / "new").is_dir()


def test_a_second_writer_is_refused_by_name(tmp_path: Path, encoded: Path):
    config = TrainConfig(model=MODEL, data=encoded, images=64)
    with exclusive_lock(tmp_path):
        with pytest.raises(ValueError, match=f"{tmp_path}: another process is writing"):
            train(config, tmp_path)
        with pytest.raises(ValueError, match="another process is writing"):
            run_demo(DemoConfig(folder=tmp_path, quick=True))
