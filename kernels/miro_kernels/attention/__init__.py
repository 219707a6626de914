"""Attention over image tokens and ragged text tokens: the op and its reference in plain torch."""

from miro_kernels.attention.op import attention
from miro_kernels.attention.reference import attention_reference

__all__ = ["attention", "attention_reference"]
