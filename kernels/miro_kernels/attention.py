"""Attention of image tokens over themselves and over their sample's text, which is ragged.

    o[b, i] = Σ_j p[b, i, j] V[b, j],    p[b, i] = softmax_j(q[b, i] · K[b, j] / sqrt(head size))

K[b] are the image keys of sample b followed by its own text keys, text_k[offsets[b]:offsets[b+1]].
Texts lie end to end without padding; a sample without text attends to its image alone.

Backward, with Δ[b, i] = Σ_channels o·do and z = q · K / sqrt(head size):

    dz = p · (do · Vᵀ − Δ),    dq = dz K / sqrt(head size),    dK = dzᵀ q / sqrt(head size),
    dV = pᵀ do

FlashAttention-2 (arXiv 2307.08691) in both directions. Saved: the arguments, o, and the log-sum-exp
of each row of logits, fp32. Least traffic in elements: q, k, v, o and the texts once forward;
backward q, k, v, o, do, dq, dk, dv and the texts with their gradients once. A tile of queries reads
its sample's keys again, from the second-level cache where they fit there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from miro_kernels import backend
from miro_kernels._checks import check_device, check_floats, check_rank, check_shape, widen
from miro_kernels.attention_backward import attention_backward
from miro_kernels.attention_forward import attention_forward
from miro_kernels.attention_on_cpu import LEAST_TOKENS, attention_on_cpu
from miro_kernels.attention_rows import SIZES


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    text_offsets: Tensor,
    longest_text: int,
) -> Tensor:
    """Compute `attention` in plain torch, on padded texts with a mask; arguments as there."""
    if longest_text == 0 or len(text_k) == 0:
        # The text gets zero gradients instead of None, as from the kernels: ranks that all-reduce
        # gradients must agree on which exist.
        k, v = k + text_k[:0].sum(), v + text_v[:0].sum()
        mask = None
    else:
        lengths = text_offsets.diff()
        owner = torch.repeat_interleave(lengths, output_size=len(text_k))
        place = torch.arange(len(text_k), device=q.device) - text_offsets[:-1][owner]
        rows = owner.long() * longest_text + place

        def padded(text: Tensor) -> Tensor:
            # Pad with zeros, not with another sample's tokens: a NaN would survive the mask.
            empty = text.new_zeros(len(q) * longest_text, *text.shape[1:])
            return empty.index_copy(0, rows, text).unflatten(0, (len(q), longest_text))

        k, v = torch.cat((k, padded(text_k)), 1), torch.cat((v, padded(text_v)), 1)
        present = torch.arange(longest_text, device=q.device) < lengths[:, None]
        image = present.new_ones(len(q), q.shape[1])
        mask = torch.cat((image, present), 1)[:, None, None]
    dtype = q.dtype
    if q.device.type == "cpu" and q.shape[1] < LEAST_TOKENS:
        # Torch's bf16 backward is slower than its fp32 one on a CPU where tokens are few.
        q, k, v = widen(q), widen(k), widen(v)
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    return out.transpose(1, 2).to(dtype)


def _side_by_side(tensor: Tensor) -> Tensor:
    """Views of a packed projection as they are; a copy where channels do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("miro::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output and the log-sum-exp of the logits, fp32 (B, heads, N)."""
    q, k, v, text_k, text_v = map(_side_by_side, (q, k, v, text_k, text_v))
    return attention_forward(q, k, v, text_k, text_v, text_offsets.contiguous())


@attention_op.register_fake
def _(q, k, v, text_k, text_v, text_offsets, longest_text):
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("miro::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, text_k and text_v."""
    dout, q, k, v, text_k, text_v = map(_side_by_side, (dout, q, k, v, text_k, text_v))
    text_offsets = text_offsets.contiguous()
    return attention_backward(dout, out, lse, q, k, v, text_k, text_v, text_offsets, longest_text)


@attention_backward_op.register_fake
def _(dout, out, lse, q, k, v, text_k, text_v, text_offsets, longest_text):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v, text_k, text_v))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest_text = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple:
    if dout is None:
        return (None,) * 7
    return *attention_backward_op(dout, *ctx.saved_tensors, ctx.longest_text), None, None


attention_op.register_autograd(_differentiate, setup_context=_save)


# Text lengths are data, their sum is a shape: with T text tokens in all, the queries meet
# N·(B·N + T) keys, exactly, and each meeting costs a product over the head size forward and
# another for the output. Backward counts 5 products for forward's 2, as torch does for its own.
@register_flop_formula(torch.ops.miro.attention)
def _forward_flops(q, k, v, text_k, *rest, **others) -> int:
    batch, tokens, heads, size = q
    return 4 * tokens * (batch * tokens + text_k[0]) * heads * size


@register_flop_formula(torch.ops.miro.attention_backward)
def _backward_flops(dout, out, lse, *inputs, **others) -> int:
    return _forward_flops(*inputs) * 5 // 2


def _flash_attn() -> Callable[..., Any]:
    """flash-attn's function, version 4 or 2."""
    try:
        from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found]
    return flash_attn_func


def _by_flash_attn(q: Tensor, k: Tensor, v: Tensor, text_tokens: int) -> Tensor:
    op = "attention: the backend flash_attn was asked for, but"
    if text_tokens:
        raise ValueError(f"{op} it takes no ragged text beside the image, got {text_tokens} tokens")
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{op} it takes bf16 and fp16 on a CUDA device, got {q.dtype} on {q.device}"
        )
    try:
        function = _flash_attn()
    except ImportError as error:
        raise ValueError(f"{op} it does not import: {error}") from error
    out = function(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def _bound_text(text_offsets: Tensor, text_tokens: int, longest_text: int | None) -> int:
    """A bound on every text's length; checks the offsets where reading them costs no wait."""
    bound = text_tokens if longest_text is None else longest_text
    if torch.compiler.is_compiling():
        return bound
    if longest_text is not None and text_offsets.device.type != "cpu":
        return bound
    offsets = text_offsets.tolist()
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    longest = max(lengths, default=0)
    if offsets[0] != 0 or offsets[-1] != text_tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"attention: text_offsets must rise from 0 to the {text_tokens} rows of text_k, "
            f"got {offsets if len(offsets) <= 9 else [*offsets[:4], '…', *offsets[-4:]]}"
        )
    if longest_text is not None and longest_text < longest:
        raise ValueError(
            f"attention: longest_text must bound every text's length, the longest is {longest}, "
            f"got {longest_text}"
        )
    return longest if longest_text is None else longest_text


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    text_offsets: Tensor,
    longest_text: int | None = None,
) -> Tensor:
    """Compute attention of image queries over the image keys and the sample's text keys.

    Args:
        q: Queries (B, N, heads, head size). Views of one packed projection are read in place.
        k: Image keys, shaped as q.
        v: Image values, shaped as q.
        text_k: Text keys (T, heads, head size), the texts of the batch concatenated.
        text_v: Text values, shaped as text_k.
        text_offsets: (B + 1,) int32; sample b's text is rows offsets[b] to offsets[b + 1].
        longest_text: A bound on every text's length. Without it the offsets are read (a sync on a
            GPU) and checked, as they always are on a CPU. Inside torch.compile nothing is read, and
            the default bound is T.

    Returns:
        (B, N, heads, head size) in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or offset does not fit, the message names the argument;
            or the requested backend is unavailable.
    """
    op = "attention"
    check_rank(op, "q", q, "B N heads head_size")
    batch, _, heads, size = q.shape
    for name, tensor in (("k", k), ("v", v)):
        check_shape(op, name, tensor, tuple(q.shape), "(B, N, heads, head size)")
    for name, tensor in (("text_k", text_k), ("text_v", text_v)):
        check_shape(op, name, tensor, (len(text_k), heads, size), "(T, heads, head size)")
    check_shape(op, "text_offsets", text_offsets, (batch + 1,), "(B + 1,)")
    if text_offsets.dtype != torch.int32:
        raise ValueError(f"{op}: text_offsets must be int32, got {text_offsets.dtype}")
    check_floats(op, q=q, k=k, v=v, text_k=text_k, text_v=text_v)
    check_device(op, "text_offsets", text_offsets, "q", q)
    for name, tensor in (("k", k), ("v", v), ("text_k", text_k), ("text_v", text_v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    bound = _bound_text(text_offsets, len(text_k), longest_text)
    if backend.backend() == "flash_attn":
        return _by_flash_attn(q, k, v, len(text_k))
    unsupported = f"the head size is {size}, not one of {SIZES}" if size not in SIZES else None
    if backend.select_backend(op, q, unsupported) == "torch":
        arguments = q, k, v, text_k, text_v, text_offsets, bound
        if q.device.type == "cpu" and q.shape[1] >= LEAST_TOKENS:
            return attention_on_cpu(*arguments)[0]
        return attention_reference(*arguments)
    return attention_op(q, k, v, text_k, text_v, text_offsets, bound)[0]
