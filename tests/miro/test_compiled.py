"""Compilation on a CPU: one block is compiled for all, and few activations are saved."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import REWARDS, TEXT, engine, inputs
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from miro.model.transformer import FlowTransformer, ModelConfig
from miro.training.config import TrainConfig
from miro.training.engine import Engine
from miro.training.loop import train

DEPTH, CHANNELS, HIDDEN, TOKENS = 4, 32, 96, 64


def deep(regional_compile: bool = False) -> FlowTransformer:
    torch.manual_seed(0)
    config = ModelConfig(CHANNELS, DEPTH, 2, HIDDEN, patch=2)
    model = FlowTransformer(config, (2, 16, 16), TEXT, REWARDS, regional_compile=regional_compile)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape)
    return model


def predict(made: Engine, batch: int, height: int = 16, width: int = 16) -> Tensor:
    _, t, rewards, text = inputs(1, batch)
    x = torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(2))
    return made.predict(x, t, rewards, text)


@pytest.fixture(scope="module")
def compiled() -> Engine:
    return engine(model=deep(regional_compile=True), compiled=True)


@pytest.mark.parametrize("batch", [5, 7])
def test_the_gradients_of_all_blocks_equal_those_of_eager(compiled: Engine, batch: int) -> None:
    """Each block has its own weights; also for a batch size other than the first compiled."""
    plain = engine(model=deep())

    for made in (compiled, plain):
        made.model.zero_grad()
        made.backward(predict(made, batch).square().mean())

    for name, param in plain.parameters.items():
        grad = compiled.parameters[name].grad
        torch.testing.assert_close(grad, param.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_compiled_block_takes_any_batch_and_grid(compiled: Engine) -> None:
    plain = engine(model=deep())

    for size in ((3, 8, 32), (6, 24, 12)):
        torch.testing.assert_close(
            predict(compiled, *size), predict(plain, *size), rtol=1e-4, atol=1e-4
        )


def test_what_is_cheap_is_computed_again_and_not_saved(compiled: Engine) -> None:
    """Not saved are the normalized tokens and SwiGLU's output; 2 · HIDDEN is SwiGLU's input."""
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = 7
    with saved_tensors_hooks(save, lambda tensor: tensor):
        predict(compiled, batch)

    for param in compiled.parameters.values():
        saved.pop(param.untyped_storage().data_ptr(), None)
    a_block = 4 * batch * TOKENS * (12.5 * CHANNELS + 2 * HIDDEN)
    assert 0.8 < sum(saved.values()) / (DEPTH * a_block) < 1


def test_one_block_is_compiled_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[fx.GraphModule] = []

    def watch(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=watch))
    with torch.no_grad():
        predict(engine(model=deep(regional_compile=True), compiled=True), batch=5)

    (graph,) = graphs
    region = torch.ops.higher_order.invoke_subgraph
    calls = [node for node in graph.graph.nodes if node.target is region]
    assert len(calls) == DEPTH and len({node.args[0].target for node in calls}) == 1


def test_a_run_on_a_cpu_compiles_one_block_for_all(
    training: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[fx.GraphModule] = []

    def watch(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=watch))
    deeper = replace(training.model, depth=2)  # torch inlines a region that is called once
    train(replace(training, model=deeper, images=8, compile=True, ema_weights_at=()), tmp_path)

    region = torch.ops.higher_order.invoke_subgraph
    assert sum(node.target is region for graph in graphs for node in graph.graph.nodes) == 2
