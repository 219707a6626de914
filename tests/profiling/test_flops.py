"""FLOPs: counted against derived by hand, and against published figures."""

from dataclasses import replace

import count_flops
import pytest
import step_budget
import torch
from bench_utils import LATENTS
from count_flops import NetworkFlops, count, derived, ours, published
from torch import nn

from miro.model.transformer import FlowTransformer
from miro.training.flops import forward_flops, training_flops
from miro.training.presets import preset
from miro_kernels import use_backend
from miro_kernels.backend import allow_cpu_tensors


def test_a_multiply_add_is_two_flops() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(3, 5, bias=False), torch.empty(7, 3)

    assert count(lambda: layer(x)) == 2 * 7 * 3 * 5


@pytest.mark.parametrize("text", [1, 77, 256])
@pytest.mark.parametrize("name", ["small", "large"])
def test_counted_flops_of_our_presets_equal_the_derivation(name: str, text: int) -> None:
    config = preset(name).model

    found = ours(name, config, text, LATENTS)

    assert found.forward == sum(derived(config, text, LATENTS).values())


@pytest.mark.parametrize("images", [1, 3])
def test_the_flops_of_a_batch_equal_those_of_the_kernels(images: int) -> None:
    """The kernels look up embeddings without matrix products."""
    config, text = preset("demo").model, 9
    batch = step_budget.inputs(images, text, "meta")
    with torch.device("meta"):
        model = FlowTransformer(config, LATENTS, batch.text.states.shape[1], 7)
    with (
        use_backend("triton"),
        allow_cpu_tensors(),
        torch.no_grad(),
        step_budget.Budget() as budget,
    ):
        step_budget.forward(model, replace(batch, text=batch.text.to(dtype=torch.float32)))

    shapes = batch.x.shape, batch.text.states.shape, (7, batch.rewards.levels.numel())
    found = forward_flops(config, *shapes)

    assert sum(row.flops for row in budget.operations.values()) == sum(found.values())
    assert training_flops(config, *shapes) == 3 * sum(found.values())


def test_training_is_three_passes_and_guidance_two() -> None:
    row = NetworkFlops("any", 256, 77, 1, 10.0, steps=50, calls=2)

    assert (row.training, row.sampling) == (30.0, 1000.0)


def test_published_networks_have_their_published_flops_and_sizes() -> None:
    rows = {(row.model, row.pixels): row for row in published()}

    # DiT (arXiv 2212.09748) gives 118.64 GFLOPs, in multiply-adds.
    assert rows["DiT-XL/2", 256].forward == pytest.approx(2 * 118.64e9, rel=5e-3)
    sizes = {"PixArt-α": 0.61e9, "SD3-medium": 2.03e9, "Sana 1.6B": 1.60e9, "FLUX.1-dev": 11.9e9}
    for (name, _), row in rows.items():
        if name in sizes:
            assert row.parameters == pytest.approx(sizes[name], rel=0.01), name
    # The MIRO paper gives 1540 TFLOPs for FLUX: multiply-adds of 50 steps without attention.
    assert rows["FLUX.1-dev", 1024].sampling / 2 > 1540e12


def test_the_table_has_every_row() -> None:
    row = NetworkFlops("a model", 512, 120, 10**9, 1e9, 20, 2)

    lines = count_flops.table([row]).splitlines()

    assert len(lines) == 2 and lines[1].split()[:4] == ["a", "model", "512", "120"]
