"""Two processes never write one folder."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from openmoji.demo import DemoConfig, run_demo

from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.presets import ModelConfig
from miro.utils import locks
from miro.utils.locks import blocking_lock, exclusive_lock

MODEL = ModelConfig(channels=32, depth=1, heads=1, hidden=32, patch=8)


def lock_and_wait(folder: Path, locked: Connection) -> None:
    with exclusive_lock(folder):
        locked.send(True)
        signal.pause()


def test_a_folder_can_be_locked_again_after_its_writer_ends(tmp_path: Path):
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


def test_a_lock_is_released_when_its_process_is_killed(tmp_path: Path):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=lock_and_wait, args=(tmp_path, theirs)
    )
    process.start()
    assert ours.recv()
    with pytest.raises(ValueError, match="another process is writing"), exclusive_lock(tmp_path):
        pass

    process.kill()
    process.join()

    with exclusive_lock(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_about_once(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    locks._warn_unsupported.cache_clear()

    with exclusive_lock(tmp_path), blocking_lock(tmp_path), exclusive_lock(tmp_path / "inner"):
        pass

    assert caplog.text.count(f"{tmp_path}: this file system has no locks") == 1
