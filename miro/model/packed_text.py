"""PackedText: text states of a batch, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedText:
    """The token states of B texts, end to end.

    states: (T, dim), any float dtype;
    offsets: int32 (B+1,), text b is states[offsets[b] : offsets[b + 1]];
    longest: the largest length, known on the host so that no kernel launch waits for the device.
    """

    states: Tensor
    offsets: Tensor
    longest: int

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens per text, int32 (B,)."""
        return self.offsets.diff()

    def text(self, index: int) -> Tensor:
        """The states of one text, (length, dim): a view."""
        start, stop = self.offsets[index : index + 2].tolist()
        return self.states[start:stop]

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> PackedText:
        """The same texts on `device` (states and offsets) and in `dtype` (states alone)."""
        states = self.states.to(device=device, dtype=dtype, non_blocking=True)
        return PackedText(states, self.offsets.to(device=device, non_blocking=True), self.longest)

    def select(self, indices: Tensor) -> PackedText:
        """The texts at `indices` (int64 (n,)), in that order; an index may repeat."""
        index = indices.to(self.offsets.device)
        lengths = self.lengths[index]
        offsets = _offsets(lengths)
        # Token t of the result is token t - offsets[b] of its source text.
        shift = (self.offsets[index] - offsets[:-1]).repeat_interleave(lengths)
        tokens = torch.arange(shift.numel(), device=shift.device) + shift
        return PackedText(self.states[tokens], offsets, int(lengths.max()) if len(index) else 0)

    def keep(self, mask: Tensor) -> PackedText:
        """Texts whose `mask` (bool (B,)) is False become absent: this is text dropout."""
        mask = mask.to(self.offsets.device)
        lengths = self.lengths * mask
        states = self.states[mask.repeat_interleave(self.lengths)]
        return PackedText(states, _offsets(lengths), int(lengths.max()) if len(self) else 0)

    def cat(self, other: PackedText) -> PackedText:
        """These texts, then `other`'s."""
        offsets = torch.cat([self.offsets, other.offsets[1:] + self.offsets[-1]])
        longest = max(self.longest, other.longest)
        return PackedText(torch.cat([self.states, other.states]), offsets, longest)


def _offsets(lengths: Tensor) -> Tensor:
    """int32 (B,) lengths -> int32 (B+1,) offsets."""
    offsets = lengths.new_zeros(lengths.numel() + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
    return offsets


def pack(texts: Sequence[Tensor]) -> PackedText:
    """Texts (length_i, dim), at least one and all of one dim and dtype, as one `PackedText`."""
    if not texts:
        raise ValueError("pack needs at least one text; for no text at all use `absent`")
    dims = {tuple(text.shape[1:]) for text in texts}
    if len(dims) != 1 or len(next(iter(dims))) != 1:
        raise ValueError(f"texts must all be (length, dim) of one dim, got shapes (…, {dims})")
    lengths = [text.shape[0] for text in texts]
    offsets = _offsets(torch.tensor(lengths, dtype=torch.int32, device=texts[0].device))
    return PackedText(torch.cat(list(texts)), offsets, max(lengths))


def absent(
    count: int,
    dim: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PackedText:
    """`count` absent texts: what a branch without text reads."""
    states = torch.zeros(0, dim, device=device, dtype=dtype)
    return PackedText(states, torch.zeros(count + 1, dtype=torch.int32, device=device), 0)
