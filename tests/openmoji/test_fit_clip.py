"""The alignment model: fitting, saving, word order, and refusal of other folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from openmoji.alignment import Alignment, alignment_auc, auc
from openmoji.fit_clip import FitClipConfig, fit_clip
from openmoji.scenes import SceneStream, render_samples, write_scenes

from miro.rewards.base import RewardOptions
from miro.rewards.registry import build_reward

TINY = FitClipConfig(steps=30, batch_size=8, warmup_steps=3, conv_width=8, text_width=32)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, samples=96, seed=3, split="train")
    return folder


@pytest.fixture(scope="module")
def fitted(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_clip(scenes, tmp_path_factory.mktemp("clip") / "fitted", config=TINY)


def test_fitting_lowers_the_loss(fitted: Path):
    losses = json.loads((fitted / "metrics.json").read_text())["loss"]
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_configuration_gives_the_same_weights(scenes: Path, fitted: Path, tmp_path: Path):
    again = fit_clip(scenes, tmp_path / "again", config=TINY)
    assert (again / "model.safetensors").read_bytes() == (fitted / "model.safetensors").read_bytes()


def test_a_fitted_model_is_not_fitted_again(scenes: Path, fitted: Path):
    before = (fitted / "metrics.json").stat().st_mtime_ns
    fit_clip(scenes, fitted, config=TINY)
    assert (fitted / "metrics.json").stat().st_mtime_ns == before


def test_a_folder_of_another_configuration_is_refused_by_key(scenes: Path, fitted: Path):
    with pytest.raises(ValueError, match="config.steps: 31 here, 30 there"):
        fit_clip(scenes, fitted, config=replace(TINY, steps=31))


def test_a_score_depends_on_word_order_and_not_on_the_batch(fitted: Path):
    reward = build_reward(f"openmoji.alignment:Alignment={fitted}")
    sample = SceneStream(5)[0]
    image = torch.from_numpy(render_samples([sample])[0]).permute(2, 0, 1)
    captions = ["a frog left of a fish", "a fish left of a frog", "a frog"]
    together = reward.score([image] * 3, captions)
    alone = torch.cat([reward.score([image], [caption]) for caption in captions])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together[0] != together[1]
    assert together.isfinite().all()


def test_other_sizes_unknown_words_and_long_captions_are_scored(fitted: Path):
    reward = build_reward(f"openmoji.alignment:Alignment={fitted}")
    image = torch.full((3, 50, 70), 128, dtype=torch.uint8)
    scores = reward.score([image, image], ["zebra crossing", "a frog and " * 60])
    assert scores.shape == (2,) and scores.isfinite().all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors.*cannot be"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{}"), "not of version 1"),
        (
            lambda folder: (folder / "open_clip_config.json").write_text(
                '{"version": 1, "architecture": "ViT-B-32"}'
            ),
            "another kind of model",
        ),
        (lambda folder: (folder / "open_clip_config.json").unlink(), "no such file; write one"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(fitted: Path, tmp_path: Path, damage, message: str):
    for path in fitted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Alignment(str(tmp_path), RewardOptions())


def test_alignment_without_weights_names_the_remedy():
    with pytest.raises(ValueError, match="python -m openmoji fit-clip"):
        build_reward("openmoji.alignment:Alignment")


def test_auc_counts_ties_half():
    positive, negative = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 2.0])
    assert auc(positive, negative) == pytest.approx((3 + 2 * 0.5 + 0) / 6)


def test_a_perfect_reward_has_an_auc_of_one():
    class Perfect:
        name, model, reads_caption = "perfect", "none", True

        def score(self, images, captions):
            # Called with the true captions first, for each kind.
            self.calls = getattr(self, "calls", 0) + 1
            return torch.full((len(images),), float(self.calls % 2))

    found = alignment_auc(Perfect(), scenes=5)
    assert found == dict.fromkeys(found, 1.0) and len(found) == 5
