"""Layouts of a step, what DeepSpeed is told of them, and that none changes what is learned."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.engines import CONFIG, PLAN, engine, inputs, learn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miro.model.packed_text import pack
from miro.model.transformer import RewardCond
from miro.training.batch_plan import BatchPlan, ShardingConfig, deepspeed_config, plan_batch
from miro.training.engine import Engine


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_is_told_what_the_layout_says(stage: Any, precision: Any) -> None:
    plan = BatchPlan(stage, world=8, micro_batch=4, accumulation=2)

    told = deepspeed_config(plan, precision, "cuda")

    assert told["train_batch_size"] == plan.batch == 64
    assert told["train_micro_batch_size_per_gpu"] == 4
    assert told["gradient_accumulation_steps"] == 2
    assert told["zero_optimization"]["stage"] == stage
    # At stage 0 the optimizer keeps the masters, and DeepSpeed sees plain parameters.
    assert ("bf16" in told) == (precision == "bf16" and stage > 0)


@pytest.mark.parametrize(
    ("batch", "world", "micro", "accumulation"), [(64, 4, None, 1), (64, 4, 4, 4), (6, 1, 2, 3)]
)
def test_a_batch_is_micro_batch_times_accumulation_times_world(
    batch: int, world: int, micro: int | None, accumulation: int
) -> None:
    plan = plan_batch(ShardingConfig(micro_batch=micro), batch=batch, world=world, stage=1)

    assert plan.batch == batch and plan.accumulation == accumulation
    row = [
        image
        for rank in range(world)
        for start in plan.positions(rank, 1000)
        for image in range(start, start + plan.micro_batch)
    ]
    assert sorted(row) == list(range(1000, 1000 + batch))


@pytest.mark.parametrize(
    ("sharding", "batch", "world", "message"),
    [
        (ShardingConfig(), 10, 4, "batch=10 does not divide among 4 processes"),
        (ShardingConfig(micro_batch=3), 8, 2, "batch=8 is no multiple of sharding.micro_batch=3"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(
    sharding: ShardingConfig, batch: int, world: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_batch(sharding, batch=batch, world=world, stage=0)


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
def test_what_does_not_go_together_is_refused_with_what_does(
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
def test_impossible_shardings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardingConfig(**options)


# Each cut, and its precision. Loss and average must be those of stage 0 to the precision.
ALONE = [
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


class Reads(TorchDispatchMode):
    """Counts what waits for a device: a tensor's number read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_nothing(
    stage: Any, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the references of the kernels, which check and read what a kernel takes as it is.

    Stage 3 waits once a step, for DeepSpeed's own norm.
    """
    made = engine(plan=BatchPlan(stage, 1, 4, 1), precision=precision)
    whole = inputs(1)
    learn(made, part_of_loss(made, whole, slice(0, 4)), images=0)
    monkeypatch.setattr(made.optimizer, "step", lambda closure=None: None)
    levels = torch.arange(5)
    monkeypatch.setattr(F, "one_hot", lambda bins, _: (bins[..., None] == levels).long())

    with Reads() as reads:
        error = made.predict(*whole).square().mean()
        made.backward(error)
        made.step(4)

    assert reads.count == 0


@pytest.mark.parametrize(("plan", "precision"), ALONE)
def test_every_layout_learns_what_the_plain_one_does(plan: BatchPlan, precision: Any) -> None:
    plain, cut = (engine(plan=which, precision=precision) for which in (PLAN, plan))
    for images in range(0, 20, 4):
        whole = inputs(images)
        learn(plain, part_of_loss(plain, whole, slice(0, 4)), images)
        for start in range(0, 4, plan.micro_batch):
            cut.backward(part_of_loss(cut, whole, slice(start, start + plan.micro_batch)))
        cut.step(images)

    close = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.05, "atol": 0.02}
    for name, average in plain.ema_state_dict().items():
        torch.testing.assert_close(cut.ema_state_dict()[name], average, **close, msg=name)


def part_of_loss(engine: Engine, whole: Any, part: slice) -> Tensor:
    x, t, rewards, text = whole
    some = RewardCond(rewards.levels, rewards.bins[part], rewards.keep[part])
    texts = pack([text.text(n) for n in range(len(text))][part])
    predicted = engine.predict(x[part], t[part], some, texts)
    return (predicted - x.flip(0)[part]).square().mean()
