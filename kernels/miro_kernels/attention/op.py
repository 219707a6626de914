"""Attention of image tokens over themselves and over their sample's ragged text tokens.

    o[b, i] = Σ_j p[b, i, j] V[b, j],    p[b, i] = softmax_j(q[b, i] · K[b, j] / sqrt(head size))

K[b] is the image keys of sample b followed by its text keys, text_k[offsets[b]:offsets[b+1]]. Texts
are packed without padding (varlen); a sample without text attends to its image alone.

Backward, with Δ[b, i] = Σ_channels o·do and z = q · K / sqrt(head size):

    dz = p · (do · Vᵀ − Δ),    dq = dz K / sqrt(head size),    dK = dzᵀ q / sqrt(head size),
    dV = pᵀ do

FlashAttention-2 (arXiv 2307.08691) in both directions. Saved for backward: the arguments, o, and
the fp32 log-sum-exp of each row of logits. Least traffic in elements: forward q, k, v, o and the
texts once; backward q, k, v, o, do, dq, dk, dv and the texts with their gradients once. Each tile
of queries reads its sample's keys again, from L2 if they fit there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miro_kernels import backend
from miro_kernels._checks import check_device, check_floats, check_rank, check_shape
from miro_kernels.attention.backward import attention_backward
from miro_kernels.attention.cpu import attention_on_cpu
from miro_kernels.attention.forward import attention_forward
from miro_kernels.attention.library import register_attention
from miro_kernels.attention.reference import CPU_FLASH_MIN_TOKENS, attention_reference
from miro_kernels.attention.tile_ops import HEAD_SIZES


def _channel_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with a channel stride of 1; a view of a packed projection is not copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, text_k, text_v = map(_channel_contiguous, (q, k, v, text_k, text_v))
    return attention_forward(q, k, v, text_k, text_v, text_offsets.contiguous())


def _backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_offsets: Tensor,
    longest_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dout, q, k, v, text_k, text_v = map(_channel_contiguous, (dout, q, k, v, text_k, text_v))
    text_offsets = text_offsets.contiguous()
    return attention_backward(dout, out, lse, q, k, v, text_k, text_v, text_offsets, longest_text)


def _query_key_pairs(q: tuple, text_k: tuple, longest_text: int) -> int:
    """Exact although the text lengths are data: their sum is a shape."""
    batch, tokens, _, _ = q
    return tokens * (batch * tokens + text_k[0])


attention_op = register_attention("attention", _forward, _backward, _query_key_pairs)


def _flash_attn_func() -> Callable[..., Any]:
    """flash_attn_func of flash-attn 4, or of version 2."""
    try:
        from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found]
    return flash_attn_func


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, text_tokens: int) -> Tensor:
    """Attention without text by the flash-attn package."""
    op = "attention: the backend flash_attn was requested, but"
    if text_tokens:
        raise ValueError(f"{op} it supports no ragged text keys, got {text_tokens} text tokens")
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{op} it supports bf16 and fp16 on a CUDA device, got {q.dtype} on {q.device}"
        )
    try:
        function = _flash_attn_func()
    except ImportError as error:
        raise ValueError(f"{op} it cannot be imported: {error}") from error
    out = function(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def _text_length_bound(text_offsets: Tensor, text_tokens: int, longest_text: int | None) -> int:
    """An upper bound of the text lengths; validates offsets if reading them needs no extra sync."""
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
            f"attention: longest_text must be at least the longest text's length {longest}, "
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
    """Attention of q over [k, the sample's text_k].

    Args:
        q: (B, N, heads, head size); q, k and v may be views of one packed projection.
        k: image keys, like q.
        v: image values, like q.
        text_k: text keys of the batch without padding, (T, heads, head size).
        text_v: text values, like text_k.
        text_offsets: (B + 1,) int32; sample b's text is rows offsets[b] to offsets[b + 1].
        longest_text: an upper bound of the text lengths. None computes it from the offsets, which
            syncs with the device (inside torch.compile T is used instead). Offsets are validated
            where they are read: on a CPU, or if this is None.

    Returns:
        (B, N, heads, head size) in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or offset is wrong (the message names the argument), or
            the requested backend is unavailable.
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
    bound = _text_length_bound(text_offsets, len(text_k), longest_text)
    if backend.backend() == "flash_attn":
        return _flash_attn(q, k, v, len(text_k))
    unsupported = None
    if size not in HEAD_SIZES:
        unsupported = f"the head size is {size}, not one of {HEAD_SIZES}"
    arguments = q, k, v, text_k, text_v, text_offsets, bound
    if backend.select_backend(op, q, unsupported) == "triton":
        return attention_op(*arguments)[0]
    if q.device.type == "cpu" and q.shape[1] >= CPU_FLASH_MIN_TOKENS:
        return attention_on_cpu(*arguments)[0]
    return attention_reference(*arguments)
