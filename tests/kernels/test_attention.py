"""Attention over image and ragged text, against an explicit softmax per sample and head."""

import sys
from collections.abc import Callable
from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from miro_kernels import attention, use_backend
from miro_kernels.attention import attention_reference
from miro_kernels.attention.cpu import attention_on_cpu
from miro_kernels.attention.op import attention_op
from miro_kernels.attention.reference import CPU_FLASH_MIN_TOKENS
from miro_kernels.lab import testing

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
    inputs: dict[str, Any] = {name: draw(*image, dtype=dtype) * 1.5 for name in ("q", "k", "v")}
    inputs |= {name: draw(*text, dtype=dtype) * 1.5 for name in ("text_k", "text_v")}
    offsets = list(accumulate(lengths, initial=0))
    return inputs | {"text_offsets": torch.tensor(offsets, dtype=torch.int32)}


def explicit_attention(given: dict[str, Any]) -> Tensor:
    """One sample and head at a time, without mask and padding."""
    out = torch.empty_like(given["q"])
    offsets = given["text_offsets"].tolist()
    for b, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        keys = torch.cat((given["k"][b], given["text_k"][start:end]))
        values = torch.cat((given["v"][b], given["text_v"][start:end]))
        for head in range(keys.shape[1]):
            logits = given["q"][b, :, head] @ keys[:, head].T / keys.shape[2] ** 0.5
            probs = logits.exp() / logits.exp().sum(1, keepdim=True)
            out[b, :, head] = probs @ values[:, head]
    return out


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_sample_attends_to_its_image_and_its_own_text(draw: Draw, lengths: list[int]) -> None:
    given = arguments(draw, lengths)

    out = attention(**given)

    torch.testing.assert_close(out, explicit_attention(given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 1), (7, 3, 31), (0, 2, 4)])
def test_odd_and_tiny_sizes(draw: Draw, tokens: int, heads: int, size: int) -> None:
    given = arguments(draw, [2, 0, 5], tokens, heads, size)

    torch.testing.assert_close(attention(**given), explicit_attention(given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bound", [3, 4, 20])
def test_longest_text_may_be_any_upper_bound(draw: Draw, bound: int) -> None:
    given = arguments(draw, [3, 0, 2])

    out = attention(**given, longest_text=bound)

    torch.testing.assert_close(out, attention(**given), rtol=1e-12, atol=1e-12)


def test_views_of_one_projection_give_the_results_of_contiguous_copies(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 2])
    given["q"], given["k"], given["v"] = draw(3, 4, 3, 2, 6).unbind(2)
    given["text_k"], given["text_v"] = draw(5, 2, 2, 6).unbind(1)

    out = attention(**given)

    for name, value in given.items():
        given[name] = value.contiguous()
    torch.testing.assert_close(out, attention(**given))


@pytest.mark.parametrize("name", ["text_k", "text_v"])
@pytest.mark.parametrize("lengths", [[2, 3, 0, 1], [0, 1, 4, 0]])
def test_nan_in_the_text_of_a_sample_does_not_reach_other_samples(
    draw: Draw, name: str, lengths: list[int]
) -> None:
    given = arguments(draw, lengths)
    clean = attention(**given)
    given[name][int(given["text_offsets"][1])] = torch.nan  # the first token of sample 1

    out = attention(**given)

    assert out[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(out[others], clean[others])


def test_bf16_output_is_the_fp64_output_rounded_once(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 9], 16, 2, 32, torch.bfloat16)

    out = attention(**given)

    assert out.dtype == torch.bfloat16
    exact = attention(**{n: z.double() if z.is_floating_point() else z for n, z in given.items()})
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("lengths", [[2, 0, 1], [0, 2, 0], [0, 0]], ids=str)
def test_gradcheck_of_every_argument(draw: Draw, lengths: list[int]) -> None:
    given = arguments(draw, lengths, tokens=2, heads=2, size=3)
    names = ["q", "k", "v"] + ["text_k", "text_v"] * (sum(lengths) > 0)

    def op(*values: Tensor) -> Tensor:
        changed: dict[str, Any] = dict(zip(names, values, strict=True))
        return attention(**given | changed)

    assert torch.autograd.gradcheck(op, [given[name].requires_grad_() for name in names])


def test_gradients_do_not_depend_on_the_bound_of_text_lengths(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 2])
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v", "text_k", "text_v")]

    grads = [
        torch.autograd.grad(attention(**given, longest_text=bound).square().sum(), leaves)
        for bound in (3, 12)
    ]

    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changed", ["k", "v", "text_k", "text_v", "text_offsets"])
def test_an_argument_of_the_wrong_shape_is_named(draw: Draw, changed: str) -> None:
    given = arguments(draw, [3, 0, 2])
    good = tuple(given[changed].shape)
    given[changed] = torch.cat((given[changed], given[changed]), -1)

    with pytest.raises(ValueError) as error:
        attention(**given)

    for part in ("attention", changed, str(good), str(tuple(given[changed].shape))):
        assert part in str(error.value)


def test_offsets_of_another_integer_dtype_are_refused(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 2])
    given["text_offsets"] = given["text_offsets"].long()

    with pytest.raises(ValueError, match=r"text_offsets must be int32, got torch\.int64"):
        attention(**given)


@pytest.mark.parametrize("changed", ["k", "v", "text_k", "text_v"])
def test_an_argument_of_another_dtype_is_named(draw: Draw, changed: str) -> None:
    given = arguments(draw, [3, 0, 2])
    given[changed] = given[changed].float()

    with pytest.raises(ValueError, match=f"{changed} must have q's dtype .*64, got .*32"):
        attention(**given)


@pytest.mark.parametrize("changed", ["k", "v", "text_k", "text_v", "text_offsets"])
def test_an_argument_on_another_device_is_named(draw: Draw, changed: str) -> None:
    given = arguments(draw, [3, 0, 2])
    given[changed] = given[changed].to("meta")

    with pytest.raises(ValueError, match=f"attention: {changed} must be on cpu as q is, got meta"):
        attention(**given)


@pytest.mark.parametrize("offsets", [[1, 3, 3, 5], [0, 3, 3, 4], [0, 4, 3, 5], [0, 3, 3, 6]])
def test_offsets_that_do_not_rise_over_the_text_are_refused(draw: Draw, offsets: list[int]) -> None:
    given = arguments(draw, [3, 0, 2])
    given["text_offsets"] = torch.tensor(offsets, dtype=torch.int32)

    with pytest.raises(ValueError, match="text_offsets must rise from 0 to the 5 rows") as error:
        attention(**given)

    assert str(offsets) in str(error.value)


def test_a_bound_below_the_longest_text_is_refused(draw: Draw) -> None:
    with pytest.raises(ValueError, match="longest_text must be .* length 3, got 2"):
        attention(**arguments(draw, [3, 0, 2]), longest_text=2)


def test_an_unavailable_triton_backend_is_refused_with_the_reason(draw: Draw) -> None:
    with use_backend("triton"), pytest.raises(ValueError, match="attention: .* triton .* but"):
        attention(**arguments(draw, [3, 0, 2], size=32, dtype=torch.float32))


@pytest.mark.parametrize(
    ("lengths", "dtype", "reason"),
    [
        ([3, 0, 2], torch.bfloat16, "no ragged text keys, got 5 text tokens"),
        ([0, 0], torch.float32, "bf16 and fp16 on a CUDA device, got torch.float32 on cpu"),
        ([0, 0], torch.bfloat16, "bf16 and fp16 on a CUDA device, got torch.bfloat16 on cpu"),
    ],
)
def test_an_unavailable_flash_attn_backend_is_refused_with_the_reason(
    draw: Draw, lengths: list[int], dtype: torch.dtype, reason: str
) -> None:
    with use_backend("flash_attn"), pytest.raises(ValueError, match=reason):
        attention(**arguments(draw, lengths, dtype=dtype))


@pytest.mark.parametrize("version", [2, 4])
def test_flash_attn_computes_attention_without_text(
    monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """On fake CUDA tensors; flash-attn 2 returns o, 4 returns (o, lse)."""
    calls = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, None]:
        calls.append(q)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2)
        return out if version == 2 else (out, None)

    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    for module in (package, cute)[: version // 2]:
        monkeypatch.setattr(module, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute if version == 4 else None)

    with FakeTensorMode(), use_backend("flash_attn"):
        q = torch.empty(2, 5, 3, 32, dtype=torch.bfloat16, device="cuda")
        text = q.new_empty(0, 3, 32)
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        assert attention(q, q, q, text, text, offsets, 0).shape == q.shape
        assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_many_tokens_on_a_cpu(draw: Draw, lengths: list[int], dtype: torch.dtype) -> None:
    """Views of one projection, with a bound larger than the longest text."""
    image = draw(len(lengths), CPU_FLASH_MIN_TOKENS + 1, 3, 2, 32).to(dtype).unbind(2)
    text = draw(sum(lengths), 2, 2, 32).to(dtype).unbind(1)
    offsets = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    names = ("q", "k", "v", "text_k", "text_v")
    given: dict[str, Any] = {
        name: z.detach().requires_grad_() for name, z in zip(names, image + text, strict=True)
    }
    given |= {"text_offsets": offsets, "longest_text": max(lengths, default=0) + 3}

    testing.assert_close(
        attention, attention_reference, given, gradient=testing.transposed_gradient
    )


def test_on_a_cpu_many_tokens_save_only_arguments_output_and_lse(draw: Draw) -> None:
    given = arguments(draw, [3, 0, 9], CPU_FLASH_MIN_TOKENS, 2, 32, torch.bfloat16)
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v", "text_k", "text_v")]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attention(**given)

    known = {z.untyped_storage().data_ptr() for z in (*leaves, out, given["text_offsets"])}
    (lse,) = (z for z in saved if z.untyped_storage().data_ptr() not in known)
    assert lse.shape == (3, 2, CPU_FLASH_MIN_TOKENS)


def test_flops_on_a_cpu_include_padding() -> None:
    batch, tokens, text, heads, size, longest = 3, CPU_FLASH_MIN_TOKENS, 7, 2, 32, 4
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q = torch.empty(batch, tokens, heads, size, requires_grad=True)
        text_k = torch.empty(text, heads, size, requires_grad=True)
        offsets = torch.empty(batch + 1, dtype=torch.int32)
        attention_on_cpu(q, q, q, text_k, text_k, offsets, longest)[0].sum().backward()

    pairs = batch * tokens * (tokens + longest)
    assert counter.get_total_flops() == (2 + 5) * 2 * pairs * heads * size


def test_flops_count_each_pair_of_query_and_key_without_padding() -> None:
    batch, tokens, text, heads, size = 3, 5, 7, 2, 32
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q = torch.empty(batch, tokens, heads, size, requires_grad=True)
        text_k = torch.empty(text, heads, size, requires_grad=True)
        offsets = torch.empty(batch + 1, dtype=torch.int32)
        attention_op(q, q, q, text_k, text_k, offsets, 4)[0].sum().backward()

    pairs = tokens * (batch * tokens + text)
    assert counter.get_total_flops() == (2 + 5) * 2 * pairs * heads * size
