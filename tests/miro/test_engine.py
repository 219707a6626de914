"""The engine: precision, weight decay, clipping, schedules of learning rate and EMA, state."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.engines import CONFIG, PLAN, SHAPE, TEXT, build, engine, inputs, learn
from torch import Tensor

from miro.model.packed_text import empty_text
from miro.model.transformer import FlowTransformer, ModelConfig
from miro.training.engine import Engine
from miro.training.optimizer import OptimizerConfig, ema_decay, lr_multiplier
from miro.training.zero_shards import ShardSlice


def loss(engine: Engine, seed: int, captioned: bool = True) -> Tensor:
    x, t, rewards, text = inputs(seed)
    text = text if captioned else empty_text(len(text), TEXT)
    return (engine.predict(x, t, rewards, text) - x.flip(0)).square().mean()


def gradients(engine: Engine, seed: int) -> list[Tensor]:
    """Gradients of `loss` by autograd on the network itself."""
    x, t, rewards, text = inputs(seed)
    out = engine.model(x, t, rewards, engine.model.encode_context(text))
    error = (out - x.flip(0)).square().mean()
    return list(torch.autograd.grad(error, list(engine.parameters.values())))


Read = Callable[[str, ShardSlice], Tensor]


def saved(engine: Engine) -> tuple[Read, dict[str, Any]]:
    """A copy of the engine's state, in the form of `load_state`'s arguments."""
    shards, state = engine.checkpoint_state()
    copies = {
        (key, shard.name): tensor.clone()
        for shard in shards
        for key, tensor in shard.tensors.items()
    }
    return lambda key, shard: copies[key, shard.name], state


def weights(engine: Engine) -> dict[str, Tensor]:
    return {
        name: engine.optimizer.master(param).detach().clone()
        for name, param in engine.parameters.items()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_training_lowers_the_loss_of_its_batch(precision: Any, matrices: Any) -> None:
    trained = engine(replace(CONFIG, name=matrices), precision=precision)
    before = loss(trained, 1).item()

    for images in range(0, 120, 4):
        learn(trained, loss(trained, 1), images)

    assert loss(trained, 1).item() < 0.7 * before


def test_bf16_has_unrounded_fp32_master_weights() -> None:
    initial = dict(build().named_parameters())

    made = engine(precision="bf16")

    for name, master in weights(made).items():
        assert master.dtype == torch.float32 and torch.equal(master, initial[name])
        assert torch.equal(made.ema_state_dict()[name], initial[name])
    assert all(param.dtype == torch.bfloat16 for param in made.parameters.values())
    assert made.model.cos.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_matrices_decay_and_gains_offsets_and_biases_do_not(precision: Any, matrices: Any) -> None:
    made = engine(replace(CONFIG, name=matrices), precision=precision)
    before = weights(made)

    learn(made, 0 * loss(made, 1), images=0)

    decayed = 1 - CONFIG.learning_rate * CONFIG.weight_decay
    for name, after in weights(made).items():
        undecayed = name.endswith(("bias", "norm")) or after.ndim == 1 or name == "offsets"
        torch.testing.assert_close(after, before[name] * (1 if undecayed else decayed), msg=name)
    assert {n for n in before if n.startswith("table.")} == {
        "table.hidden", "table.hidden_bias", "table.out", "table.out_bias"
    }  # fmt: skip


def test_gradients_are_clipped_by_their_global_norm_which_is_returned() -> None:
    made = engine(OptimizerConfig(max_grad_norm=1e-3))
    grads = gradients(made, 1)
    expected = torch.stack([grad.norm() for grad in grads]).norm()

    norm = learn(made, loss(made, 1), images=0)

    torch.testing.assert_close(norm, expected)
    assert norm > 1e-3
    # After one step exp_avg is (1 − β₁) times the gradient.
    seen = [
        made.optimizer.state[param]["exp_avg"].norm() / 0.1 for param in made.parameters.values()
    ]
    torch.testing.assert_close(torch.stack(seen).norm(), torch.tensor(1e-3), rtol=1e-2, atol=0)
    assert all(param.grad is None for param in made.parameters.values())


def test_gradients_below_the_limit_are_unchanged() -> None:
    made = engine(OptimizerConfig(max_grad_norm=1e6))
    expected = gradients(made, 1)

    learn(made, loss(made, 1), images=0)

    for param, grad in zip(made.parameters.values(), expected, strict=True):
        torch.testing.assert_close(made.optimizer.state[param]["exp_avg"], 0.1 * grad)


def test_the_ema_weights_follow_the_weights() -> None:
    made = engine()
    ema = weights(made)

    for images in (0, 4, 8):
        learn(made, loss(made, images), images)
        decay = ema_decay(CONFIG, images, 4)
        ema = {n: decay * ema[n] + (1 - decay) * w for n, w in weights(made).items()}

    for name, tensor in made.ema_state_dict().items():
        torch.testing.assert_close(tensor, ema[name])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_a_loaded_state_continues_bit_for_bit(precision: Any, matrices: Any) -> None:
    config = replace(CONFIG, name=matrices)
    first = engine(config, precision=precision)
    for images in range(0, 20, 4):
        # At one step all captions are dropped, and the weights of the text have no gradient.
        learn(first, loss(first, images, captioned=images != 8), images)
    state = saved(first)
    again = engine(config, precision=precision)

    again.load_state(*state)

    for images in range(20, 40, 4):
        for made in (first, again):
            learn(made, loss(made, images), images)
    for name, tensor in weights(first).items():
        assert torch.equal(weights(again)[name], tensor)
        assert torch.equal(again.ema_state_dict()[name], first.ema_state_dict()[name])
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.parameters.values(), again.parameters.values(), strict=True)
    )


@pytest.mark.parametrize(
    "other",
    [build(width=24), build(rewards=3), FlowTransformer(ModelConfig(16, 2, 2, 24, 2), SHAPE, 6, 2)],
    ids=["wider", "more rewards", "deeper"],
)
def test_the_state_of_another_network_is_refused(other: FlowTransformer) -> None:
    theirs = engine(model=other)

    with pytest.raises(ValueError, match="checkpoint is of another network"):
        engine().load_state(*saved(theirs))
    with pytest.raises(ValueError, match="checkpoint is of another network"):
        theirs.load_state(*saved(engine()))


def test_the_learning_rate_warms_up_stays_constant_and_decays_to_zero() -> None:
    config = OptimizerConfig(warmup_images=100, decay_from=0.8)

    factors = [lr_multiplier(config, images, 1000) for images in range(1000)]

    assert 0 < factors[0] <= 0.01 and abs(factors[49] - 0.5) < 1e-9
    assert factors[99:800] == [1.0] * 701
    assert abs(factors[900] - 0.5) < 1e-9 and 0 < factors[999] < 0.01
    assert factors[:100] == sorted(factors[:100])
    assert factors[800:] == sorted(factors[800:], reverse=True)


def test_without_warmup_and_decay_the_learning_rate_is_constant() -> None:
    assert {lr_multiplier(OptimizerConfig(), images, 100) for images in range(100)} == {1.0}


def test_the_learning_rate_reaches_the_optimizer() -> None:
    made = engine(OptimizerConfig(learning_rate=0.01, decay_from=0.5))

    learn(made, loss(made, 1), images=300)

    assert {group["lr"] for group in made.optimizer.param_groups} == {0.01 * 0.5}


@pytest.mark.parametrize("batch", [1, 64, 500])
def test_the_ema_decays_to_one_half_over_its_half_life(batch: int) -> None:
    config = OptimizerConfig(ema_halflife_images=10_000, ema_rampup_ratio=0.05)

    steps = 10_000 // batch
    late = [ema_decay(config, 1_000_000 + n * batch, batch) for n in range(steps)]

    assert abs(math.prod(late) - 0.5) < 1e-3


def test_the_half_life_ramps_up_with_the_images() -> None:
    config = OptimizerConfig(ema_halflife_images=10_000, ema_rampup_ratio=0.05)

    # After 2,000 images the half-life is 5 % of them.
    assert abs(ema_decay(config, 2_000 - 64, 64) - 0.5 ** (64 / 100)) < 1e-9
    assert ema_decay(config, 0, 64) < 1e-5 < ema_decay(config, 640, 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("learning_rate", float("nan")), ("max_grad_norm", 0.0),
     ("ema_halflife_images", -1.0), ("ema_rampup_ratio", 0.0), ("decay_from", 1.5),
     ("decay_from", -0.1), ("warmup_images", -5), ("weight_decay", -0.1), ("beta1", 1.0),
     ("beta2", 1.5), ("eps", 0.0)],
)  # fmt: skip
def test_invalid_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{name}.*got {value}"):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_nan_gradients_is_skipped_and_counted(stage: Any, precision: Any) -> None:
    made = engine(plan=replace(PLAN, stage=stage), precision=precision)
    learn(made, loss(made, 1), images=0)
    before = {name: tensor.clone() for name, tensor in saved_tensors(made).items()}

    learn(made, loss(made, 1) * torch.nan, images=4)

    assert made.gradient_clipper.state_dict() | {"mean": 0} == {
        "mean": 0,
        "in_row": 1,
        "longest": 1,
        "total": 1,
    }
    for name, tensor in saved_tensors(made).items():
        assert torch.equal(tensor, before[name]), name
    learn(made, loss(made, 1), images=8)
    assert (
        made.gradient_clipper.state_dict()["in_row"] == 0
        and made.gradient_clipper.state_dict()["total"] == 1
    )
    assert not torch.equal(saved_tensors(made)["master/out.bias"], before["master/out.bias"])


def test_a_gradient_spike_is_skipped_and_a_large_gradient_is_not() -> None:
    made = engine(replace(CONFIG, skip_threshold=10.0))
    skipped = []
    for factor in (1.0, 5.0, 100.0, 1.0):
        learn(made, factor * loss(made, 1), images=0)
        skipped.append(made.gradient_clipper.state_dict()["total"])

    assert skipped == [0, 0, 1, 1]


def saved_tensors(engine: Engine) -> dict[str, Tensor]:
    return {
        f"{key}/{shard.name}": tensor
        for shard in engine.checkpoint_state()[0]
        for key, tensor in shard.tensors.items()
    }
