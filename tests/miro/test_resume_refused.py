"""A run that cannot go on says so and changes nothing: no good checkpoint, other data or ranks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.corrupt import flip_a_byte
from helpers.image_folders import file_contents
from helpers.multirank import MultiRank

from miro.cli.main import main
from miro.data.shards import (
    Manifest,
    read_scores,
    scores_path,
    shard_path,
    write_scores,
    write_shard,
)
from miro.sources.tar import iterate_shard
from miro.training import checkpoint
from miro.training.checkpoint import MANIFEST, RANK_FILE, CheckpointError, RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.metrics_log import read_metrics


@pytest.fixture
def run(undisturbed: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of a finished run, with the checkpoints of 80 and 96 images."""
    shutil.copytree(undisturbed.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def make_newer(path: Path) -> None:
    manifest = path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 3'))


def damage(path: Path) -> None:
    flip_a_byte(path / RANK_FILE.format(0))


@pytest.mark.parametrize("change", [make_newer, damage])
def test_a_run_none_of_whose_checkpoints_is_good_is_refused_and_unchanged(
    training: TrainConfig, run: RunFolder, change: Callable[[Path], None]
) -> None:
    for _, path in checkpoint.list_checkpoints(run.checkpoints):
        change(path)
    before = file_contents(run.root)

    with pytest.raises(CheckpointError, match="has 2 checkpoints and none can be resumed from"):
        train(training, run.root)

    assert file_contents(run.root) == before


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_an_incomplete_one(
    training: TrainConfig, run: RunFolder
) -> None:
    path = run.checkpoint(96) / RANK_FILE.format(0)
    path.unlink()
    path.symlink_to(path.name)  # Opening it fails with ELOOP, also for root.

    with pytest.raises(OSError, match="symbolic links"):
        train(training, run.root)

    assert len(read_metrics(run.metrics)) == 12


def test_a_run_whose_checkpoints_were_removed_is_refused(
    training: TrainConfig, run: RunFolder
) -> None:
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ValueError, match="trained for 96 images and has no checkpoint"):
        train(training, run.root)
    assert len(read_metrics(run.metrics)) == 12


def test_a_run_interrupted_before_its_first_checkpoint_begins_again_and_says_so(
    training: TrainConfig, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(run.checkpoints)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:2]))

    train(training, run.root)

    assert "interrupted after 16 images, before the first checkpoint" in caplog.text
    assert [line["images"] for line in read_metrics(run.metrics)] == list(range(8, 97, 8))


def test_files_of_a_run_follow_the_umask(training: TrainConfig, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        train(replace(training, images=16, ema_weights_at=()), tmp_path / "run")
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {"0o664"}


def test_data_of_another_encoding_is_refused_on_resume(
    training: TrainConfig, run: RunFolder, tmp_path: Path
) -> None:
    assert training.data is not None
    other = tmp_path / "other"
    shutil.copytree(training.data, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["encoding"]["max_tokens"] = 77
    (other / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(ValueError, match=r"another encoding .*max_tokens: 77 here, 256 there"):
        train(replace(training, data=other), run.root)


def train_own(folder: Path, *configs: TrainConfig) -> None:
    train(configs[int(os.environ["RANK"])], folder)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"seed": 7}, "configuration"), ({"data": "others"}, "samples")],
)
def test_ranks_of_different_configurations_or_data_are_refused(
    training: TrainConfig, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    assert training.data is not None
    if "data" in change:
        change = {"data": tmp_path / "others"}
        shutil.copytree(training.data, tmp_path / "others")
        rename_first_sample(tmp_path / "others")
    other = replace(training, **change)

    processes = MultiRank(2, tmp_path / "logs", tmp_path / "run", training, other, action=train_own)
    assert processes.wait() == [1, 1]

    assert f"ranks 1 have another {name} than rank 0" in processes.log_text()
    assert not RunFolder(tmp_path / "run").config.exists()


def rename_first_sample(folder: Path) -> None:
    """Give the first sample of a dataset folder another key."""
    manifest = Manifest.read(folder)
    first = manifest.shards[0]
    samples = list(iterate_shard(shard_path(folder, first)))
    renamed = [("another", samples[0][1]), *samples[1:]]
    scores = read_scores(folder)
    shard = write_shard(shard_path(folder, first), renamed)
    replace(manifest, shards=(shard, *manifest.shards[1:])).write(folder)
    keys = ["another" if key == samples[0][0] else key for key in scores.keys]
    columns = dict(zip(scores.rewards, scores.values.T, strict=True))
    write_scores(scores_path(folder, shard), keys, scores.captions, columns)


def test_an_option_that_an_older_run_lacks_has_its_default(
    training: TrainConfig, run: RunFolder
) -> None:
    record = json.loads(run.config.read_text())
    del record["optimizer"]["skip_threshold"], record["on_failed_save"]
    run.config.write_text(json.dumps(record))

    assert train(training, run.root) == run.weights_at(96)


def test_more_weights_may_be_asked_for_on_resume(training: TrainConfig, run: RunFolder) -> None:
    shutil.rmtree(run.checkpoint(96))
    train(replace(training, ema_weights_at=(40, 88)), run.root)
    assert [images for images, _ in run.weights_written()] == [40, 88, 96]


def test_a_broken_configuration_is_named(training: TrainConfig, run: RunFolder) -> None:
    run.config.write_text("{ broken")
    with pytest.raises(ValueError, match=r"config\.json cannot be read: Expecting property name"):
        train(training, run.root)


def test_a_file_in_place_of_the_runs_folder_is_refused(
    training: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=r"run is a file; give a folder"):
        train(training, tmp_path / "run")


def test_a_command_raises_the_limit_of_open_files() -> None:
    code = (
        "import resource\n"
        "from miro.cli.main import main\n"
        "try: main(['export', 'nowhere', 'dest'])\n"
        "except SystemExit: pass\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4096)
    done = subprocess.run(
        ["bash", "-c", f'ulimit -Sn 256; ulimit -Hn {hard}; exec "$0" "$@"',
         sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(hard), str(hard)]


def test_a_path_with_brackets_is_printed_as_it_is(
    training: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["images=16", "batch=8", "threads=1", "compile=False", "report_every=8"]
    words += ["checkpoint_every=16", "model.channels=32", "model.depth=1", "model.heads=2"]
    folder = tmp_path / ("long" * 20) / "sweep[/lr]"
    main(["train", "demo", *words, "--run", str(folder), "--data", str(training.data)])

    assert f"weights are in {folder}/weights" in capsys.readouterr().err
