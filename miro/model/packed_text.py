"""PackedText: the text states of a batch, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedText:
    """Token states of B texts, concatenated."""

    states: Tensor
    """(T, dim), any float dtype."""
    offsets: Tensor
    """(B + 1,) int32: text b is states[offsets[b] : offsets[b + 1]]."""
    longest: int
    """The largest length, on the host: reading it from the device would be a sync."""

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens per text, (B,) int32."""
        return self.offsets.diff()

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> PackedText:
        """Move states and offsets to `device`, and cast the states to `dtype`."""
        states = self.states.to(device=device, dtype=dtype, non_blocking=True)
        return PackedText(states, self.offsets.to(device=device, non_blocking=True), self.longest)

    def keep(self, mask: Tensor) -> PackedText:
        """Text dropout: texts whose `mask` (bool (B,)) is False become empty."""
        mask = mask.to(self.offsets.device)
        lengths = self.lengths * mask
        states = self.states[mask.repeat_interleave(self.lengths)]
        return PackedText(states, _offsets(lengths), int(lengths.max()) if len(self) else 0)


def _offsets(lengths: Tensor) -> Tensor:
    """(B,) int32 lengths to (B + 1,) int32 offsets."""
    offsets = lengths.new_zeros(lengths.numel() + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    return offsets


def pack(texts: Sequence[Tensor]) -> PackedText:
    """Concatenate texts (length_i, dim).

    Raises:
        ValueError: no texts, or texts of different `dim`.
    """
    if not texts:
        raise ValueError("pack needs at least one text; for a batch without text use `empty_text`")
    dims = {tuple(text.shape[1:]) for text in texts}
    if len(dims) != 1 or len(next(iter(dims))) != 1:
        raise ValueError(f"texts must all be (length, dim) of one dim, got shapes (…, {dims})")
    lengths = [text.shape[0] for text in texts]
    offsets = _offsets(torch.tensor(lengths, dtype=torch.int32, device=texts[0].device))
    return PackedText(torch.cat(list(texts)), offsets, max(lengths))


def empty_text(
    count: int,
    dim: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PackedText:
    """`count` texts of length zero, the text condition of unconditional branches."""
    states = torch.zeros(0, dim, device=device, dtype=dtype)
    return PackedText(states, torch.zeros(count + 1, dtype=torch.int32, device=device), 0)
