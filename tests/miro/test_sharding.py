"""Runs of several processes: the result does not depend on the sharding."""

import math
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.corrupt import flip_a_byte
from helpers.full_disk import fill
from helpers.kill import train_until
from helpers.multirank import MultiRank, train_multirank
from torch import Tensor

from miro.training import checkpoint
from miro.training.batch_plan import ShardingConfig
from miro.training.checkpoint import CheckpointReader, RunFolder
from miro.training.config import TrainConfig
from miro.training.metrics import loss_groups
from miro.training.metrics_log import read_metrics
from miro.utils.stop_request import EXIT_STOPPED

# ZeRO stage, ranks, and accumulated micro-batches; `make test-long` runs all of them.
PLANS = [(stage, world, times) for stage in (0, 1, 2, 3) for world in (1, 2, 4) for times in (1, 4)]
SHORT = [(0, 2, 1), (1, 2, 1), (2, 2, 4), (3, 2, 1), (2, 1, 1), (3, 4, 4)]


def shard(
    config: TrainConfig, stage: int, world: int, times: int = 1, **options: Any
) -> TrainConfig:
    micro = config.batch // world // times
    sharding = ShardingConfig(stage=str(stage), micro_batch=micro, **options)  # type: ignore[arg-type]
    return replace(config, sharding=sharding)


def losses(folder: Path) -> Tensor:
    """(reports, groups): the mean loss of each group, 0 for empty groups."""
    names = loss_groups(("colourfulness", "sharpness"))
    lines = read_metrics(RunFolder(folder).metrics)
    return torch.tensor([[line.get(name, 0.0) for name in names] for line in lines])


def state_at(folder: Path, images: int) -> dict[str, Tensor]:
    """Master weights, EMA weights and moments by name, unsharded."""
    reader = CheckpointReader(RunFolder(folder).checkpoint(images))
    reader.check()
    return {
        f"{key}/{name}": reader.read(key, name, 0, math.prod(shape))
        for name, shape in reader.state["shapes"].items()
        for key in ("master", "ema", "exp_avg", "exp_avg_sq")
    }


@pytest.fixture(scope="module")
def long(training: TrainConfig) -> TrainConfig:
    """50 steps of 16 images, each reported, with two checkpoints."""
    return replace(
        training, images=800, batch=16, report_every=16, checkpoint_every=400, ema_weights_at=()
    )


@pytest.fixture(scope="module")
def reference(long: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 0 on one rank without accumulation."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train_multirank(1, shard(long, 0, 1), folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "world", "times"),
    [
        pytest.param(*c, marks=() if c in SHORT else pytest.mark.long)
        for c in PLANS
        if c != (0, 1, 1)
    ],
)
def test_losses_and_ema_weights_do_not_depend_on_stage_ranks_or_accumulation(
    long: TrainConfig, reference: Path, tmp_path: Path, stage: int, world: int, times: int
) -> None:
    train_multirank(world, shard(long, stage, world, times), tmp_path / "run")

    found, expected = losses(tmp_path / "run"), losses(reference)
    assert len(found) == 50 and expected[-1, 0] < 0.9 * expected[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for name, tensor in state_at(reference, 800).items():
        if name.startswith("ema"):
            ours = state_at(tmp_path / "run", 800)[name]
            assert (ours - tensor).abs().max() < 1e-4 * tensor.abs().max() + 1e-5, name


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_resumes_at_other_world_sizes(
    long: TrainConfig, reference: Path, tmp_path: Path, stage: int
) -> None:
    """Two ranks, then one, then four."""
    config = replace(long, checkpoint_every=16, keep_checkpoints=100)
    for world, images in ((2, 256), (1, 512), (4, 800)):
        processes = MultiRank(
            world, tmp_path / f"{world}", shard(config, stage, world), tmp_path / "run"
        )
        run = RunFolder(tmp_path / "run")
        if images < 800:
            processes.wait(lambda: run.checkpoint(images).exists(), kill=world - 1)  # noqa: B023
        else:
            assert processes.wait() == [0] * world, processes.log_text()

    torch.testing.assert_close(losses(run.root), losses(reference), rtol=1e-5, atol=0)
    expected = state_at(reference, 800)
    for name, tensor in state_at(run.root, 800).items():
        if name.startswith("ema"):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def saving(folder: Path) -> bool:
    return any(RunFolder(folder).checkpoints.glob(".*.writing"))


@pytest.fixture(scope="module")
def pair(training: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `training` on two ranks at stage 2. Do not write."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    train_multirank(2, shard(training, 2, 2), folder)
    return folder


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    ours, theirs = (RunFolder(root) for root in (folder, undisturbed))
    assert not list(ours.root.rglob("*.writing"))
    for of in (lambda run: run.checkpoint(96), lambda run: run.weights_at(96)):
        (tensors, state), (expected, expected_state) = map(checkpoint.load, (of(ours), of(theirs)))
        for either in (state, expected_state):
            either.pop("config", None)  # Intervals and sharding may differ.
        assert tensors.keys() == expected.keys() and state == expected_state
        assert [n for n in expected if not torch.equal(tensors[n], expected[n])] == []
    assert torch.equal(losses(folder), losses(undisturbed))


def moments(count: int) -> list[tuple[int, float, int]]:
    """(reports to wait for, seconds more, rank to kill), seeded; every third during a save."""
    draw = random.Random(5)
    return [
        (-1 if n % 3 == 2 else draw.randrange(12), draw.random() * 0.05, draw.randrange(2))
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=() if n < 3 else pytest.mark.long) for n, m in enumerate(moments(20))],
)
def test_a_run_whose_rank_is_killed_resumes_bit_for_bit(
    training: TrainConfig, pair: Path, tmp_path: Path, moment: tuple[int, float, int]
) -> None:
    reports, seconds, rank = moment
    config, folder = shard(training, 2, 2), tmp_path / "run"
    metrics = RunFolder(folder).metrics

    def seen() -> bool:
        if reports < 0:
            return saving(folder)
        if len(read_metrics(metrics)) < reports:
            return False
        time.sleep(seconds)
        return True

    codes = MultiRank(2, tmp_path / "logs", config, folder).wait(seen, kill=rank)
    assert codes != [0, 0] or reports >= 0

    train_multirank(2, config, folder)

    assert_same_end(folder, pair)


@pytest.mark.parametrize(
    "moment",
    [
        ("os.rename", "checkpoints/.000000000048.writing"),
        ("os.rename", "checkpoints/.latest.partial"),
    ],
    ids=["before a checkpoint counts", "before latest moves"],
)
def test_a_run_whose_first_rank_is_killed_at_the_rename_resumes_bit_for_bit(
    training: TrainConfig, pair: Path, tmp_path: Path, moment: tuple[str, str]
) -> None:
    config, folder = shard(training, 2, 2), tmp_path / "run"

    codes = MultiRank(2, tmp_path / "logs", config, folder, moment, action=train_until).wait()
    assert codes[0] == -9

    train_multirank(2, config, folder)

    assert_same_end(folder, pair)


def test_sigterm_saves_a_checkpoint_exits_with_75_and_the_run_resumes(
    training: TrainConfig, pair: Path, tmp_path: Path
) -> None:
    config, folder = shard(replace(training, checkpoint_every=96), 2, 2), tmp_path / "run"
    run, processes = RunFolder(folder), MultiRank(2, tmp_path / "logs", config, folder)
    while len(read_metrics(run.metrics)) < 2 and processes.ranks[0].is_alive():
        time.sleep(0.002)
    processes.terminate()

    assert processes.wait() == [EXIT_STOPPED] * 2, processes.log_text()
    saved = [images for images, _ in checkpoint.list_checkpoints(run.checkpoints)]
    assert len(saved) == 1 and 16 <= saved[0] < 96
    assert run.latest.read_text() == f"{saved[0]:012d}\n"

    train_multirank(2, config, folder)

    assert_same_end(folder, pair)


def test_all_ranks_skip_a_checkpoint_with_one_damaged_file(
    training: TrainConfig, pair: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pair, folder)
    part = RunFolder(folder).checkpoint(96) / checkpoint.RANK_FILE.format(1)
    flip_a_byte(part)

    processes = MultiRank(2, tmp_path / "logs", shard(training, 2, 2), folder)
    assert processes.wait() == [0, 0]

    assert f"{part} is damaged" in processes.log_text()
    assert_same_end(folder, pair)


def test_a_full_disk_stops_all_ranks_and_the_run_resumes_once_there_is_space(
    training: TrainConfig, pair: Path, small_disk: Path, tmp_path: Path
) -> None:
    config, folder = shard(training, 2, 2), small_disk / "run"
    run = RunFolder(folder)
    processes = MultiRank(2, tmp_path / "logs", config, folder)
    while not run.checkpoint(16).exists() and processes.ranks[0].is_alive():
        time.sleep(0.001)
    filler = fill(small_disk, left=4096)

    assert processes.wait() == [1, 1]
    assert (
        "make room and resume" in processes.log_text() and "could not write" in processes.log_text()
    )
    found = checkpoint.open_newest(run.checkpoints)
    assert found is not None

    filler.unlink()
    train_multirank(2, config, folder)
    assert_same_end(folder, pair)
