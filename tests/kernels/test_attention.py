"""Attention over image and ragged text, against a softmax written out for each sample alone."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from miro_kernels import attention

Draw = Callable[..., Tensor]
LENGTHS = {
    "mixed": [3, 1, 2],
    "one empty": [3, 0, 2],
    "first empty": [0, 4, 1],
    "empty at the end": [2, 1, 0],
    "only the last": [0, 0, 4],
    "all empty": [0, 0, 0],
    "one sample": [5],
    "no sample": [],
}


def arguments(
    draw: Draw, lengths: list[int], tokens: int = 4, heads: int = 2, size: int = 6,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:  # fmt: skip
    image, text = (len(lengths), tokens, heads, size), (sum(lengths), heads, size)
    made: dict[str, Any] = {name: draw(*image, dtype=dtype) * 1.5 for name in ("q", "k", "v")}
    made |= {name: draw(*text, dtype=dtype) * 1.5 for name in ("text_k", "text_v")}
    offsets = list(accumulate(lengths, initial=0))
    return made | {"text_offsets": torch.tensor(offsets, dtype=torch.int32)}


def by_samples(given: dict[str, Any]) -> Tensor:
    """Each sample and head by itself; no mask, no padding."""
    out = torch.empty_like(given["q"])
    offsets = given["text_offsets"].tolist()
    for b, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        keys = torch.cat((given["k"][b], given["text_k"][start:end]))
        values = torch.cat((given["v"][b], given["text_v"][start:end]))
        for head in range(keys.shape[1]):
            logits = given["q"][b, :, head] @ keys[:, head].T / keys.shape[2] ** 0.5
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            out[b, :, head] = weights @ values[:, head]
    return out


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_sample_attends_to_its_image_and_its_own_text(draw: Draw, lengths: list[int]) -> None:
    given = arguments(draw, lengths)

    out = attention(**given)

    torch.testing.assert_close(out, by_samples(given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 1), (7, 3, 31), (0, 2, 4)])
def test_odd_and_tiny_sizes(draw: Draw, tokens: int, heads: int, size: int) -> None:
    given = arguments(draw, [2, 0, 5], tokens, heads, size)

    torch.testing.assert_close(attention(**given), by_samples(given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bound", [3, 4, 20])
def test_the_longest_text_may_be_any_bound(draw: Draw, bound: int) -> None:
    given = arguments(draw, [3, 0, 2])

    out = attention(**given, longest_text=bound)

    torch.testing.assert_close(out, attention(**given), rtol=1e-12, atol=1e-12)


def test_slices_of_one_projection_give_what_their_copies_give(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 2])
    given["q"], given["k"], given["v"] = draw(3, 4, 3, 2, 6).unbind(2)
    given["text_k"], given["text_v"] = draw(5, 2, 2, 6).unbind(1)

    out = attention(**given)

    for name, value in given.items():
        given[name] = value.contiguous()
    torch.testing.assert_close(out, attention(**given))


@pytest.mark.parametrize("name", ["text_k", "text_v"])
@pytest.mark.parametrize("lengths", [[2, 3, 0, 1], [0, 1, 4, 0]])
def test_a_nan_in_one_samples_text_stays_in_that_sample(
    draw: Draw, name: str, lengths: list[int]
) -> None:
    given = arguments(draw, lengths)
    clean = attention(**given)
    given[name][int(given["text_offsets"][1])] = torch.nan  # the first token of sample 1

    out = attention(**given)

    assert out[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(out[others], clean[others])


def test_bf16_results_are_the_exact_ones_rounded_once(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 9], 16, 2, 32, torch.bfloat16)

    out = attention(**given)

    assert out.dtype == torch.bfloat16
    exact = attention(**{n: z.double() if z.is_floating_point() else z for n, z in given.items()})
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("lengths", [[2, 0, 1], [0, 2, 0], [0, 0]], ids=str)
def test_every_gradient(draw: Draw, lengths: list[int]) -> None:
    given = arguments(draw, lengths, tokens=2, heads=2, size=3)
    names = ["q", "k", "v"] + ["text_k", "text_v"] * (sum(lengths) > 0)

    def op(*values: Tensor) -> Tensor:
        changed: dict[str, Any] = dict(zip(names, values, strict=True))
        return attention(**given | changed)

    assert torch.autograd.gradcheck(op, [given[name].requires_grad_() for name in names])


def test_gradients_do_not_depend_on_the_bound(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 2])
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v", "text_k", "text_v")]

    found = [
        torch.autograd.grad(attention(**given, longest_text=bound).square().sum(), leaves)
        for bound in (3, 12)
    ]

    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changed", ["k", "v", "text_k", "text_v", "text_offsets"])
def test_an_argument_of_the_wrong_shape_is_named(draw: Draw, changed: str) -> None:
    given = arguments(draw, [3, 0, 2])
    good = tuple(given[changed].shape)
    given[changed] = torch.cat((given[changed], given[changed]), -1)

    with pytest.raises(ValueError) as error:
        attention(**given)

    for part in ("attention", changed, str(good), str(tuple(given[changed].shape))):
        assert part in str(error.value)


def test_offsets_of_another_integer_are_refused(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 2])
    given["text_offsets"] = given["text_offsets"].long()

    with pytest.raises(ValueError, match=r"text_offsets must be int32, got torch\.int64"):
        attention(**given)
