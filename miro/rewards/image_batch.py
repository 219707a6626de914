"""A batch of decoded images with cached preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from miro.images.transforms import ImageTransform, check_image, map_images


class ImageBatch(Sequence[Tensor]):
    """Decoded images, uint8 (3, H, W) each, preprocessed once per ImageTransform.

    An image that occurs several times, once per caption, is preprocessed once.

    Attributes:
        distinct: The distinct images.
        rows: Index into `distinct` of each element of the batch.
    """

    def __init__(self, images: Iterable[Tensor]) -> None:
        index_of: dict[int, int] = {}
        self.distinct: list[Tensor] = []
        self.rows: list[int] = []
        for image in images:
            if id(image) not in index_of:
                index_of[id(image)] = len(self.distinct)
                self.distinct.append(image)
            self.rows.append(index_of[id(image)])
        self._preprocessed: dict[ImageTransform, Tensor] = {}

    @classmethod
    def from_images(cls, images: Sequence[Tensor]) -> ImageBatch:
        """Wrap `images`; an ImageBatch is returned as it is, with its cache."""
        return images if isinstance(images, ImageBatch) else cls(images)

    def take(self, rows: Iterable[int]) -> ImageBatch:
        """Select elements by index, with repetition; the cache is shared with this batch."""
        taken = ImageBatch(())
        taken.distinct, taken._preprocessed = self.distinct, self._preprocessed
        taken.rows = [self.rows[row] for row in rows]
        return taken

    def release(self) -> None:
        """Free the decoded images; preprocessed ones stay available."""
        self.distinct = [torch.empty(3, 0, 0, dtype=torch.uint8) for _ in self.distinct]

    def preprocessed(self, transform: ImageTransform) -> Tensor:
        """Apply `transform` to each distinct image.

        Returns:
            uint8 (distinct, 3, size, size), on the images' device. Images on the CPU are processed
            by all cores.

        Raises:
            ValueError: An image is not uint8 (3, H, W), or is empty.
        """
        if transform not in self._preprocessed:
            for number, image in enumerate(self.distinct):
                check_image(number, image)
            images = map_images(self.distinct, transform)
            empty = torch.empty(0, 3, transform.size, transform.size, dtype=torch.uint8)
            self._preprocessed[transform] = torch.stack(images) if images else empty
        return self._preprocessed[transform]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self.distinct[row] for row in self.rows[index]]
        return self.distinct[self.rows[index]]
