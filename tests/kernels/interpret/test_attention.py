"""Attention's kernels against the reference: the output and every gradient."""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from miro_kernels import attention, tiles, use_backend
from miro_kernels.attention import attention_reference
from miro_kernels.attention.op import attention_op
from miro_kernels.lab import testing

Draw = Callable[..., Tensor]
LEAVES = ("q", "k", "v", "text_k", "text_v")
# (text lengths, tokens, heads, head size): every head size; odd and prime numbers of tokens, below
# and above one tile; texts longer than a tile, of some samples and of none.
SHAPES = [
    ([3, 0, 40], 37, 2, 32),
    ([0, 70], 131, 1, 64),
    ([1], 17, 2, 96),
    ([0, 5], 1, 1, 128),
    ([0, 0], 16, 1, 64),
]


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def arguments(
    draw: Draw, device: str, lengths: list[int], tokens: int, heads: int, size: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """q, k and v are views of one projection, text_k and text_v of another."""
    image = draw(len(lengths), tokens, 3, heads, size).to(device, dtype).unbind(2)
    text = draw(sum(lengths), 2, heads, size).to(device, dtype).unbind(1)
    inputs: dict[str, Any] = {
        name: z.detach().requires_grad_() for name, z in zip(LEAVES, image + text, strict=True)
    }
    offsets = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    return inputs | {
        "text_offsets": offsets.to(device),
        "longest_text": max(lengths, default=0),
    }


def assert_close(given: dict[str, Any], gradient: Any = testing.random_gradient) -> None:
    testing.assert_close(attention, attention_reference, given, gradient=gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(draw: Draw, device: str, shape: tuple) -> None:
    assert_close(arguments(draw, device, *shape), testing.transposed_gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_low_precision(draw: Draw, device: str, size: int, dtype: torch.dtype) -> None:
    assert_close(arguments(draw, device, [70, 1], 67, 1, size, dtype))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3e3), (torch.bfloat16, 1e15)])
def test_large_values(draw: Draw, device: str, dtype: torch.dtype, size: float) -> None:
    given = arguments(draw, device, [5, 0], 33, 1, 64, dtype)
    for name in ("v", "text_v"):
        given[name] = (given[name].detach().tanh() * size).requires_grad_()

    assert_close(given)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 3e4), (torch.bfloat16, 1e15)])
def test_large_logits(draw: Draw, device: str, dtype: torch.dtype, size: float) -> None:
    """Forward only: the softmax is one-hot, so its gradients are rounding errors around zero."""
    given = arguments(draw, device, [5, 0], 33, 1, 64, dtype)
    for name in ("q", "k", "text_k"):
        given[name] = (given[name].detach().tanh() * size).requires_grad_()

    assert_close(given, None)


def test_gradients_of_large_logits_are_finite(draw: Draw, device: str) -> None:
    """A GPU fuses logit · scale - lse; the rounding error of 1e30 may give exp2(large) = inf."""
    given = arguments(draw, device, [5, 0], 33, 1, 64, torch.bfloat16)
    for name in ("q", "k", "text_k"):
        given[name] = (given[name].detach().tanh() * 1e15).requires_grad_()

    for name, result in testing.evaluate(attention, given).items():
        assert result.isfinite().all(), name


def test_a_channel_stride_of_two(draw: Draw, device: str) -> None:
    given = arguments(draw, device, [2, 3], 5, 2, 32)
    for name in ("k", "text_v"):
        strided = torch.stack((given[name].detach(),) * 2, -1)[..., 0]
        assert strided.stride(-1) == 2
        given[name] = strided.requires_grad_()

    assert_close(given, lambda output, number: output.new_ones(()).expand(output.shape))


@pytest.mark.parametrize(
    ("lengths", "tokens"), [([], 4), ([2, 1], 0), ([0, 0], 0)], ids=["batch", "tokens", "both"]
)
def test_empty_inputs_give_empty_outputs_and_zero_gradients(
    draw: Draw, device: str, lengths: list[int], tokens: int
) -> None:  # fmt: skip
    results = testing.evaluate(attention, arguments(draw, device, lengths, tokens, 1, 32))

    assert results["output"].shape == (len(lengths), tokens, 1, 32)
    assert all(not results[f"d {name}"].any() for name in LEAVES)


@pytest.mark.parametrize("name", ["q", "k", "v", "text_k", "text_v"])
def test_nan_in_one_sample_does_not_reach_other_samples(draw: Draw, device: str, name: str) -> None:
    given = arguments(draw, device, [3, 2, 4], 9, 1, 32)
    clean = testing.evaluate(attention, given)
    with torch.no_grad():
        row = 3 if name.startswith("text") else 1  # sample 1, or its first text token
        given[name][row] = torch.nan

    results = testing.evaluate(attention, given)

    assert results["output"][1].isnan().all()
    others, texts = [0, 2], [0, 1, 2, 5, 6, 7, 8]
    for key in results:
        rows = texts if key.startswith("d text") else others
        assert torch.equal(results[key][rows], clean[key][rows]), key


def test_two_runs_give_the_same_bits(draw: Draw, device: str) -> None:
    given = arguments(draw, device, [3, 40], 37, 2, 64, torch.bfloat16)

    testing.assert_repeats(attention, given)


@pytest.mark.usefixtures("count")
def test_nothing_is_computed_for_padding(draw: Draw, device: str) -> None:
    """The number of tl.dot follows from each text's own tiles, not from the bound of lengths."""
    from triton.runtime.interpreter import InterpreterBuilder

    lengths, tokens, heads = [0, 5, 70, 0, 33], 150, 2
    given = arguments(draw, device, lengths, tokens, heads, 64, torch.bfloat16)
    given["longest_text"] = 512
    dot = InterpreterBuilder.create_dot
    with mock.patch.object(
        InterpreterBuilder, "create_dot", autospec=True, side_effect=dot
    ) as dots:
        out = attention(**given)
        forward = dots.call_count
        out.backward(torch.ones_like(out))

    def tile_pairs(kernel: str) -> int:
        """Pairs of a tile of queries and a tile of image or text keys."""
        tile = tiles.tile(f"attention_{kernel}_64")
        queries, keys = (-(-tokens // tile[name]) for name in ("queries", "keys"))
        return queries * sum(keys + -(-length // tile["text"]) for length in lengths) * heads

    assert forward == 2 * tile_pairs("forward")
    assert dots.call_count - forward == 3 * tile_pairs("queries") + 4 * tile_pairs("keys")


def test_opcheck_and_torch_compile(draw: Draw, device: str) -> None:
    given = arguments(draw, device, [3, 0], 5, 1, 32)

    torch.library.opcheck(attention_op, tuple(given.values()))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results, expected = (testing.evaluate(op, given) for op in (compiled, attention))

    assert all(torch.equal(results[name], expected[name]) for name in expected)
