"""FLOPs: counted against derived by hand, and against what was published."""

from dataclasses import replace

import count_flops
import pytest
import step_budget
import torch
from count_flops import LATENTS, Counted, count, derived, ours, published
from torch import nn

from miro.model.transformer import FlowTransformer
from miro.training.flops import forward_flops, training_flops
from miro.training.presets import preset
from miro_kernels import use_backend
from miro_kernels.backend import allow_cpu_tensors


def test_a_multiply_and_an_add_are_two() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(3, 5, bias=False), torch.empty(7, 3)

    assert count(lambda: layer(x)) == 2 * 7 * 3 * 5


@pytest.mark.parametrize("text", [1, 77, 256])
@pytest.mark.parametrize("name", ["small", "large"])
def test_ours_are_what_they_are_by_hand(name: str, text: int) -> None:
    config = preset(name).model

    found = ours(name, config, text, LATENTS)

    assert found.forward == sum(derived(config, text, LATENTS).values())


@pytest.mark.parametrize("images", [1, 3])
def test_the_flops_of_a_batch_are_those_of_the_kernels(images: int) -> None:
    """They gather no rows of tables by products."""
    config, text = preset("demo").model, 9
    made = step_budget.inputs(images, text, "meta")
    with torch.device("meta"):
        model = FlowTransformer(config, LATENTS, made.text.states.shape[1], 7)
    with (
        use_backend("triton"),
        allow_cpu_tensors(),
        torch.no_grad(),
        step_budget.Budget() as budget,
    ):
        step_budget.forward(model, replace(made, text=made.text.to(dtype=torch.float32)))

    shapes = made.x.shape, made.text.states.shape, (7, made.rewards.levels.numel())
    found = forward_flops(config, *shapes)

    assert sum(row.flops for row in budget.rows.values()) == sum(found.values())
    assert training_flops(config, *shapes) == 3 * sum(found.values())


def test_a_step_is_three_passes_and_guidance_two() -> None:
    row = Counted("any", 256, 77, 1, 10.0, steps=50, calls=2)

    assert (row.training, row.sampling) == (30.0, 1000.0)


def test_published_networks_have_their_published_sizes() -> None:
    rows = {(row.model, row.pixels): row for row in published()}

    # DiT (arXiv 2212.09748) calls 118.64 GFLOPs what are multiply-adds.
    assert rows["DiT-XL/2", 256].forward == pytest.approx(2 * 118.64e9, rel=5e-3)
    sizes = {"PixArt-α": 0.61e9, "SD3-medium": 2.03e9, "Sana 1.6B": 1.60e9, "FLUX.1-dev": 11.9e9}
    for (name, _), row in rows.items():
        if name in sizes:
            assert row.parameters == pytest.approx(sizes[name], rel=0.01), name
    # The paper's 1540 for FLUX are multiply-adds of 50 steps without attention's.
    assert rows["FLUX.1-dev", 1024].sampling / 2 > 1540e12


def test_the_table_names_every_row() -> None:
    row = Counted("a model", 512, 120, 10**9, 1e9, 20, 2)

    lines = count_flops.table([row]).splitlines()

    assert len(lines) == 2 and lines[1].split()[:4] == ["a", "model", "512", "120"]
