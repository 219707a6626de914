"""Batch plans, the DeepSpeed configuration of each, and that none changes what is learned."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.encoded import text_at
from helpers.engines import CONFIG, PLAN, engine, inputs, learn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miro.model.packed_text import pack
from miro.model.transformer import RewardCond
from miro.training.batch_plan import BatchPlan, ShardingConfig, deepspeed_config
from miro.training.deepspeed_internals import memory_efficient_linear
from miro.training.engine import Engine


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_configuration_of_deepspeed_follows_the_plan(stage: Any, precision: Any) -> None:
    plan = BatchPlan(stage, world=8, micro_batch=4, accumulation=2)

    config = deepspeed_config(plan, precision, "cuda")

    assert config["train_batch_size"] == plan.batch == 64
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["zero_optimization"]["stage"] == stage
    # At stage 0 AdamWEMA has the master weights, and DeepSpeed's bf16 mode is off.
    assert ("bf16" in config) == (precision == "bf16" and stage > 0)


@pytest.mark.parametrize(
    ("batch", "world", "micro", "accumulation"), [(64, 4, 16, 1), (64, 4, 4, 4), (6, 1, 2, 3)]
)
def test_a_batch_is_micro_batch_times_accumulation_times_world(
    batch: int, world: int, micro: int, accumulation: int
) -> None:
    plan = BatchPlan(1, world, micro, accumulation)

    assert plan.batch == batch
    samples = [
        image
        for rank in range(world)
        for start in plan.positions(rank, 1000)
        for image in range(start, start + plan.micro_batch)
    ]
    assert sorted(samples) == list(range(1000, 1000 + batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"plan": BatchPlan(1, 1, 4, 1), "name": "muon"},
            "choose adamw, or sharding.stage=0",
        ),
        ({"plan": BatchPlan(3, 1, 4, 1), "compiled": True}, "compile=True does not work with"),
        ({"plan": BatchPlan(1, 1, 2, 2), "precision": "bf16"}, "choose sharding.stage=2"),
    ],
)
def test_unsupported_combinations_are_refused_with_the_alternative(
    change: dict[str, Any], message: str
) -> None:
    config = replace(CONFIG, name=change.pop("name", "adamw"))

    with pytest.raises(ValueError, match=message):
        engine(config, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "optimizer", "stage": "0"}, "needs sharding.stage 1 or 2 or 3, got 0"),
        ({"offload": "parameters", "stage": "2"}, "needs sharding.stage 3, got 2"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
    ],
)
def test_invalid_sharding_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardingConfig(**options)


# Each plan and precision; EMA weights must equal those of stage 0 up to rounding.
PLANS = [
    *((BatchPlan(stage, 1, 4, 1), "fp32") for stage in (1, 2, 3)),
    (BatchPlan(0, 1, 1, 4), "fp32"),
    (BatchPlan(2, 1, 1, 4), "fp32"),
    (BatchPlan(0, 1, 4, 1, activation_checkpointing=True), "fp32"),
    (BatchPlan(3, 1, 4, 1, activation_checkpointing=True), "fp32"),
    (BatchPlan(1, 1, 4, 1, offload="optimizer"), "fp32"),
    (BatchPlan(2, 1, 2, 2, offload="optimizer"), "fp32"),
    (BatchPlan(3, 1, 4, 1, offload="parameters"), "fp32"),
    (BatchPlan(1, 1, 4, 1), "bf16"),
    (BatchPlan(0, 1, 1, 4), "bf16"),
    (BatchPlan(2, 1, 1, 4), "bf16"),
    (BatchPlan(3, 1, 2, 2), "bf16"),
]


class HostSyncs(TorchDispatchMode):
    """Counts host syncs: the value of a tensor read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_has_no_host_sync(
    stage: Any, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the kernels' references, which read values on the host that a kernel reads itself.

    Stage 3 has one sync per step, of DeepSpeed's own norm.
    """
    made = engine(plan=BatchPlan(stage, 1, 4, 1), precision=precision)
    full = inputs(1)
    learn(made, part_of_loss(made, full, slice(0, 4)), images=0)
    monkeypatch.setattr(made.optimizer, "step", lambda closure=None: None)
    levels = torch.arange(5)
    monkeypatch.setattr(F, "one_hot", lambda bins, _: (bins[..., None] == levels).long())

    with HostSyncs() as syncs:
        error = made.predict(*full).square().mean()
        made.backward(error)
        made.step(4)

    assert syncs.count == 0


@pytest.mark.parametrize(("plan", "precision"), PLANS)
def test_every_plan_learns_what_the_unsharded_one_does(plan: BatchPlan, precision: Any) -> None:
    plain, sharded = (engine(plan=which, precision=precision) for which in (PLAN, plan))
    # Adam divides by the gradient's size, so for a gradient near zero a rounding is a whole step:
    # in bf16 both need the linear layer of stage 3, which rounds otherwise than torch's.
    same_linear = plan.stage == 3 and precision == "bf16"
    for images in range(0, 20, 4):
        full = inputs(images)
        with memory_efficient_linear() if same_linear else nullcontext():
            learn(plain, part_of_loss(plain, full, slice(0, 4)), images)
        for start in range(0, 4, plan.micro_batch):
            sharded.backward(part_of_loss(sharded, full, slice(start, start + plan.micro_batch)))
        sharded.step(images)

    close: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.05, "atol": 0.02}
    )
    for name, ema in plain.ema_state_dict().items():
        torch.testing.assert_close(sharded.ema_state_dict()[name], ema, **close, msg=name)


def part_of_loss(engine: Engine, full: Any, part: slice) -> Tensor:
    x, t, rewards, text = full
    some = RewardCond(rewards.levels, rewards.bins[part], rewards.keep[part])
    texts = pack([text_at(text, n) for n in range(len(text))][part])
    predicted = engine.predict(x[part], t[part], some, texts)
    return (predicted - x.flip(0)[part]).square().mean()
