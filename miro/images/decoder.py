"""Image bytes to pixels: one function, one error, and the decoders that apply it to batches."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from PIL import Image
from torch import Tensor

# `decode` refuses earlier and with a reason; Pillow's own warning would only repeat it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


T = TypeVar("T")
AHEAD = 2  # batches


class DecodeError(ValueError):
    """Bytes that are no image we can use; the message is a reason a person understands."""


Pending = Callable[[], list[Tensor | DecodeError]]
"""Waits for a batch, and gives the image of each or why there is none."""


class Decoder(Protocol):
    """Decodes batches of encoded images, while whoever asked does something else."""

    def start(self, images: Sequence[bytes]) -> Pending:
        """Begin to decode a batch, as `decode` does but to a device of the decoder's choice."""
        ...

    def close(self) -> None:
        """Cancel pending batches and release threads and memory."""
        ...


def decode_ahead(
    items: Iterable[T], image_of: Callable[[T], bytes | None], batch_size: int, decoder: Decoder
) -> Iterator[list[tuple[T, Tensor | DecodeError | None]]]:
    """Batches of (item, its image, or why it has none), in order; None where `image_of` gives None.

    Two batches are read and decoded ahead of the reader. The decoder is left open.
    """

    def finished() -> list[tuple[T, Tensor | DecodeError | None]]:
        batch, encoded, finish = begun.popleft()
        images = iter(finish())
        return [
            (item, None if image is None else next(images))
            for item, image in zip(batch, encoded, strict=True)
        ]

    source = iter(items)
    begun: deque[tuple[list[T], list[bytes | None], Pending]] = deque()
    while batch := list(itertools.islice(source, batch_size)):
        encoded = [image_of(item) for item in batch]
        begun.append((batch, encoded, decoder.start([i for i in encoded if i is not None])))
        if len(begun) > AHEAD:
            yield finished()
    while begun:
        yield finished()
