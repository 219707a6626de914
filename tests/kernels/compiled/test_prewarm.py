"""A training step after prewarm compiles nothing; tune finds the tiles of a synthetic optimum."""

import pytest
import torch

from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, ModelConfig, RewardCond
from miro.training.batch_plan import BatchPlan
from miro.training.engine import Engine
from miro.training.optimizer import OptimizerConfig
from miro_kernels import prewarm, tiles, use_backend
from miro_kernels.lab.resources import capture
from miro_kernels.tune import tune

MODEL = ModelConfig(channels=64, depth=2, heads=2, hidden=96, patch=2)
BATCH, TOKENS, REWARDS, LEVELS = 4, 16, 2, 8


def warm(dtype: torch.dtype) -> None:
    prewarm(
        MODEL, batch=BATCH, tokens=TOKENS, rewards=REWARDS, levels=LEVELS, dtype=dtype, device="cpu"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_after_prewarm_compiles_nothing(precision: str) -> None:
    model = FlowTransformer(MODEL, (1, 8, 8), 8, REWARDS)
    engine = Engine(
        model,
        OptimizerConfig(),
        BatchPlan(stage=0, world=1, micro_batch=BATCH, accumulation=1),
        total_images=64,
        precision=precision,  # type: ignore[arg-type]
    )
    offsets = torch.tensor([0, 0, 7, 19, 30], dtype=torch.int32)
    text = PackedText(torch.zeros(30, 8), offsets, 12)
    bins = torch.zeros(BATCH, REWARDS, dtype=torch.int64)
    rewards = RewardCond(torch.arange(LEVELS) / LEVELS, bins, bins.bool())

    with capture("sm_90") as kernels:
        warm(torch.float32 if precision == "fp32" else torch.bfloat16)
        names = {kernel.kernel for kernel in kernels}
        before = len(kernels)
        for images in (0, BATCH):
            out = engine.predict(torch.zeros(BATCH, 1, 8, 8), torch.zeros(BATCH), rewards, text)
            engine.backward(out.square().mean())
            engine.step(images)

    assert before >= 10 and names
    assert [kernel.kernel for kernel in kernels[before:]] == []


def test_it_does_nothing_on_the_torch_backend() -> None:
    with use_backend("torch"):
        assert tiles.used_by(lambda: warm(torch.float32)) == {}


def test_tune_finds_the_fastest_tiles() -> None:
    def time(run: object) -> float:
        """Fastest at 256 columns and 8 warps for SwiGLU, independent of all other tiles."""
        tile = tiles.tile("swiglu_forward")
        return 10.0 + abs(tile["columns"] - 256) / 256 + abs(tile["warps"] - 8)

    with capture("sm_90"):
        found = tune(lambda: warm(torch.bfloat16), time)

    original = tiles.TILES["sm_90"]
    assert found["swiglu_forward"] == {**original["swiglu_forward"], "columns": 256, "warps": 8}
    assert {"norm_backward", "qk_forward", "adamw_ema"} <= found.keys()
    assert all(found[name] == original[name] for name in found if name != "swiglu_forward")
