"""PackedText: text states of a batch, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedText:
    """Token states of B texts of different lengths, concatenated.

    Attributes:
        states: (T, dim), any float dtype.
        offsets: int32 (B + 1,); text b is states[offsets[b] : offsets[b + 1]].
        longest: The largest length, kept on the host so that launches need no sync.
    """

    states: Tensor
    offsets: Tensor
    longest: int

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Token counts, int32 (B,)."""
        return self.offsets.diff()

    def text(self, index: int) -> Tensor:
        """Return a view (length, dim) of one text."""
        start, stop = self.offsets[index : index + 2].tolist()
        return self.states[start:stop]

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> PackedText:
        """Move states and offsets to `device`, and cast the states to `dtype`."""
        states = self.states.to(device=device, dtype=dtype, non_blocking=True)
        return PackedText(states, self.offsets.to(device=device, non_blocking=True), self.longest)

    def select(self, indices: Tensor) -> PackedText:
        """Gather texts by indices, int64 (n,); indices may repeat."""
        index = indices.to(self.offsets.device)
        lengths = self.lengths[index]
        offsets = _offsets(lengths)
        # Token t of the result is token t - offsets[b] of its source text.
        shift = (self.offsets[index] - offsets[:-1]).repeat_interleave(lengths)
        tokens = torch.arange(shift.numel(), device=shift.device) + shift
        return PackedText(self.states[tokens], offsets, int(lengths.max()) if len(index) else 0)

    def keep(self, mask: Tensor) -> PackedText:
        """Empty the texts where `mask`, bool (B,), is False: text dropout."""
        mask = mask.to(self.offsets.device)
        lengths = self.lengths * mask
        states = self.states[mask.repeat_interleave(self.lengths)]
        return PackedText(states, _offsets(lengths), int(lengths.max()) if len(self) else 0)

    def cat(self, other: PackedText) -> PackedText:
        """Concatenate along the batch dimension."""
        offsets = torch.cat([self.offsets, other.offsets[1:] + self.offsets[-1]])
        longest = max(self.longest, other.longest)
        return PackedText(torch.cat([self.states, other.states]), offsets, longest)


def _offsets(lengths: Tensor) -> Tensor:
    """Cumulative sum of lengths, int32 (B + 1,)."""
    offsets = lengths.new_zeros(lengths.numel() + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    return offsets


def pack(texts: Sequence[Tensor]) -> PackedText:
    """Pack texts (length_i, dim) of one width and dtype.

    Raises:
        ValueError: There is no text, or their widths differ.
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
    """Pack `count` empty texts, the input of the unconditional branch."""
    states = torch.zeros(0, dim, device=device, dtype=dtype)
    return PackedText(states, torch.zeros(count + 1, dtype=torch.int32, device=device), 0)
