"""Runs that begin from the weights of another: what fits is taken, the rest is listed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miro.conditioning import ConditioningConfig
from miro.model.transformer import FlowTransformer
from miro.prepare.encode import EncodeConfig, encode
from miro.sampling.export import export
from miro.training import checkpoint
from miro.training.checkpoint import CheckpointError, RunFolder
from miro.training.config import TrainConfig
from miro.training.initial_weights import load_initial_weights
from miro.training.loop import train
from miro.training.metrics_log import read_metrics

REWARDS = ("colourfulness", "sharpness")


def weights(run: RunFolder, images: int = 96) -> dict[str, Tensor]:
    return checkpoint.load(run.weights_at(images))[0]


def network(
    config: TrainConfig, rewards: int = 2, latent: tuple[int, int, int] = (3, 32, 32)
) -> FlowTransformer:
    torch.manual_seed(1)
    return FlowTransformer(config.model, latent, 384, rewards)


def test_a_network_of_the_same_shape_takes_everything(
    training: TrainConfig, undisturbed: RunFolder
) -> None:
    model = network(training)
    load_initial_weights(model, REWARDS, str(undisturbed.root))

    expected = weights(undisturbed)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_rewards_are_taken_by_name_and_new_ones_keep_their_initialization(
    training: TrainConfig, undisturbed: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model, fresh = network(training, 3), network(training, 3)
    load_initial_weights(model, ("sharpness", "another", "colourfulness"), str(undisturbed.root))

    expected = weights(undisturbed)
    for name in ("hidden", "hidden_bias", "out", "out_bias"):
        found, theirs = model.table.get_parameter(name), expected[f"table.{name}"]
        assert torch.equal(found[0], theirs[1]) and torch.equal(found[2], theirs[0])
        assert torch.equal(found[1], fresh.table.get_parameter(name)[1])
    assert "new rewards another" in caplog.text and "not taken" not in caplog.text


def test_another_resolution_takes_everything_and_another_depth_lists_the_rest(
    training: TrainConfig, undisturbed: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    load_initial_weights(network(training, 2, (3, 64, 64)), REWARDS, str(undisturbed.root))
    assert "not taken" not in caplog.text

    deeper = replace(training, model=replace(training.model, depth=2))
    model, fresh = network(deeper), network(deeper)
    load_initial_weights(model, REWARDS, str(undisturbed.root))

    assert "offsets ((5, 3, 32) here, (3, 3, 32) there)" in caplog.text
    assert "blocks.1." in caplog.text and "blocks.0." not in caplog.text
    assert torch.equal(model.offsets, fresh.offsets)


def test_nothing_that_fits_and_no_weights_are_refused(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path
) -> None:
    wider = replace(training, model=replace(training.model, channels=64, hidden=48))
    with pytest.raises(ValueError, match=r"no parameter fits this network; the first: offsets"):
        load_initial_weights(network(wider, 1, (4, 32, 32)), ("another",), str(undisturbed.root))
    with pytest.raises(CheckpointError, match="neither a weights folder nor a run"):
        load_initial_weights(network(training), REWARDS, str(tmp_path))


def test_a_hub_id_is_downloaded(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(undisturbed.root, tmp_path / "exported")
    asked: list[str] = []

    def download(name: str) -> str:
        asked.append(name)
        return str(tmp_path / "exported")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = network(training)
    load_initial_weights(model, REWARDS, "lab/model")

    assert asked == ["lab/model"]
    assert torch.equal(model.patches.weight, weights(undisturbed)["patches.weight"])


def test_a_run_begins_from_the_weights_and_a_resumed_one_does_not_read_them(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path
) -> None:
    config = replace(training, init=str(undisturbed.root), ema_weights_at=(), images=32)
    train(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")

    first, scratch = (read_metrics(r.metrics)[0]["loss"] for r in (run, undisturbed))
    assert first < scratch

    longer = replace(training, init=str(undisturbed.root), ema_weights_at=())
    with pytest.raises(KeyboardInterrupt):
        train(longer, tmp_path / "cut", report=_interrupt)
    train(replace(longer, init=str(tmp_path / "gone")), tmp_path / "cut")
    train(longer, tmp_path / "whole")
    ours, theirs = (weights(RunFolder(tmp_path / name)) for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _interrupt(progress: object) -> None:
    if getattr(progress, "images") == 40:  # noqa: B009
        raise KeyboardInterrupt


def test_a_run_at_twice_the_resolution_with_one_reward_less(
    training: TrainConfig, undisturbed: RunFolder, tmp_path: Path
) -> None:
    assert training.data is not None
    scored = training.data.parent / "scored"
    encode(scored, tmp_path / "large", config=EncodeConfig(size=64))
    config = replace(
        training,
        data=tmp_path / "large",
        init=str(undisturbed.root),
        conditioning=ConditioningConfig(reward_slots=("sharpness",)),
        images=16,
        ema_weights_at=(),
    )
    train(config, tmp_path / "run")

    _, state = checkpoint.load(RunFolder(tmp_path / "run").weights_at(16))
    assert state["encoding"]["latent_shape"] == [3, 64, 64]
    assert list(state["bins"]["edges"]) == ["sharpness"]
