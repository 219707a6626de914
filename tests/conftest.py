"""What several test files share: random tensors, a small encoded dataset, and a short run on it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.full_disk import mounted
from openmoji.scenes import write_scenes
from torch import Tensor

from miro.flow import FlowConfig
from miro.model.transformer import ModelConfig
from miro.prepare.annotate import annotate
from miro.prepare.encode import encode
from miro.training.checkpoint import RunFolder
from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.training.optimizer import OptimizerConfig

# Training is on the CPU here, whatever the machine has; read at DeepSpeed's first import.
os.environ["DS_ACCELERATOR"] = "cpu"
# Tensors are tiny here: a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """draw(*shape, dtype=float64): normal numbers of mean .3 and deviation .7, ever the same."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (numbers * 0.7 + 0.3).to(dtype)

    return make


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoded dataset folder of 64 scenes of 32 x 32 pixels with two rewards. Do not write."""
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "images", samples=64, seed=3, split="train")
    annotate(folder / "images", folder / "scored", rewards=["colourfulness", "sharpness"])
    encode(folder / "scored", folder / "encoded")
    return folder / "encoded"


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with both halves, random weights and a tokenizer of a few words. Do not write."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    folder = tmp_path_factory.mktemp("t5")
    words = [f"▁{word}" for word in "a red blue cat dog two photo of".split()]
    letters = list("abcdefghijklmnopqrstuvwxyz")
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -5.0)]
    scores += [(word, -2.0) for word in words] + [(letter, -6.0) for letter in letters]
    T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=12).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def training(encoded: Path) -> TrainConfig:
    """A run of 12 steps of 8 images: each is reported, every second leaves a checkpoint."""
    return TrainConfig(
        model=ModelConfig(channels=32, depth=1, heads=2, hidden=32, patch=8),
        data=encoded,
        images=96,
        batch=8,
        flow=FlowConfig(
            prediction_type="sample", timestep_distribution="logit_normal", loss_weight_clip=0.3
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_images=16, decay_from=0.8),
        threads=1,
        report_every=8,
        checkpoint_every=16,
        ema_weights_at=(40,),
    )


@pytest.fixture(scope="session")
def undisturbed(training: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of `training` to its end that nothing happened to. Do not write."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(training, folder)
    return RunFolder(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MB."""
    with mounted(tmp_path / "disk", "32m") as disk:
        yield disk
