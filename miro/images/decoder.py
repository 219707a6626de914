"""The protocol of image decoders, and decoding ahead of the consumer."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from PIL import Image
from torch import Tensor

# `decode` rejects such images earlier, with a reason; Pillow's warning would only repeat it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

T = TypeVar("T")
PREFETCH_BATCHES = 2


class DecodeError(ValueError):
    """The bytes cannot be decoded to an image; the message is written to rejected.jsonl."""


Pending = Callable[[], list[Tensor | DecodeError]]
"""Waits for a batch that is being decoded; uint8 (3, H, W) or the error of each image."""


class Decoder(Protocol):
    """Decodes batches of image files asynchronously."""

    def start(self, images: Sequence[bytes]) -> Pending:
        """Start decoding a batch; the tensors will be on the decoder's device."""
        ...

    def close(self) -> None:
        """Cancel pending batches and release threads and memory."""
        ...


def prefetch_decoded(
    items: Iterable[T], image_of: Callable[[T], bytes | None], batch_size: int, decoder: Decoder
) -> Iterator[list[tuple[T, Tensor | DecodeError | None]]]:
    """Decode the images of a stream of items, PREFETCH_BATCHES batches ahead of the consumer.

    Args:
        items: Any objects.
        image_of: Returns the image file of an item, None if it has none.
        batch_size: Items per batch.
        decoder: Not closed here.

    Yields:
        Batches of (item, its image, its error, or None without an image file), in order.
    """

    def finished() -> list[tuple[T, Tensor | DecodeError | None]]:
        batch, encoded, wait = pending.popleft()
        images = iter(wait())
        return [
            (item, None if image is None else next(images))
            for item, image in zip(batch, encoded, strict=True)
        ]

    source = iter(items)
    pending: deque[tuple[list[T], list[bytes | None], Pending]] = deque()
    while batch := list(itertools.islice(source, batch_size)):
        encoded = [image_of(item) for item in batch]
        pending.append((batch, encoded, decoder.start([i for i in encoded if i is not None])))
        if len(pending) > PREFETCH_BATCHES:
            yield finished()
    while pending:
        yield finished()
