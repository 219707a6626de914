"""The sizes of the presets, and the validation of TrainConfig."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from miro.model.transformer import FlowTransformer, ModelConfig
from miro.training.config import TrainConfig
from miro.training.presets import demo, large, preset, small


def billions(config: ModelConfig, text: int = 2048) -> float:
    """Billions of parameters for latents of 4 x 32 x 32, FLAN-T5 XL's states and seven rewards."""
    with torch.device("meta"):
        model = FlowTransformer(config, (4, 32, 32), text, rewards=7)
    return sum(param.numel() for param in model.parameters()) / 1e9


def test_small_has_the_size_of_the_papers_model() -> None:
    assert abs(billions(small().model) / 0.36 - 1) < 0.03


def test_large_has_about_two_billion_parameters() -> None:
    assert 1.9 < billions(large().model) < 2.2


def test_the_demo_is_small_enough_for_two_cores() -> None:
    with torch.device("meta"):
        model = FlowTransformer(demo().model, (3, 32, 32), 384, rewards=3)
    assert sum(param.numel() for param in model.parameters()) < 6e6


def test_presets_on_latents_have_256_tokens() -> None:
    for config in (small(), large()):
        with torch.device("meta"):
            model = FlowTransformer(replace(config.model, depth=1), (4, 32, 32), 64, rewards=1)
        assert len(model.cos) == 256


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown preset 'smal'; did you mean 'small'.*demo"):
        preset("smal")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 1, got -1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"images": 100}, r"no multiple of batch=64: images=100 \(nearest: 128\)"),
        ({"report_every": 65}, r"report_every=65 \(nearest: 64\)"),
        ({"checkpoint_every": 32}, r"checkpoint_every=32 \(nearest: 64\)"),
        ({"ema_weights_at": (64, 100)}, r"ema_weights_at=100 \(nearest: 128\)"),
        ({"ema_weights_at": (0,)}, "ema_weights_at: 0 must"),
        ({"images": 640, "ema_weights_at": (1280,)}, "ema_weights_at: 1280.*images=640"),
    ],
)
def test_invalid_values_are_named(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**{"model": demo().model, "report_every": 64, "checkpoint_every": 64, **bad})
