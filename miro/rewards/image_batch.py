"""A batch of decoded images whose preprocessed squares are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from miro.images.transforms import (
    ImageTransform,
    check_picture,
    for_each,
)


class ImageBatch(Sequence[Tensor]):
    """A batch of decoded pictures, uint8 (3, H, W) each, whose squares are made once.

    A picture that occurs several times, for its several captions, is one picture: `distinct` are
    the pictures, and `rows[i]` is the one that stands at i.
    """

    def __init__(self, images: Iterable[Tensor]) -> None:
        numbers: dict[int, int] = {}
        self.distinct: list[Tensor] = []
        self.rows: list[int] = []
        for image in images:
            if id(image) not in numbers:
                numbers[id(image)] = len(self.distinct)
                self.distinct.append(image)
            self.rows.append(numbers[id(image)])
        self._squares: dict[ImageTransform, Tensor] = {}

    def take(self, rows: Iterable[int]) -> ImageBatch:
        """The pictures at `rows`, an index may repeat; what is made of either is made for both."""
        taken = ImageBatch(())
        taken.distinct, taken._squares = self.distinct, self._squares
        taken.rows = [self.rows[row] for row in rows]
        return taken

    def release(self) -> None:
        """Keep the squares that were made, and let go of the pictures."""
        self.distinct = [torch.empty(3, 0, 0, dtype=torch.uint8) for _ in self.distinct]

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> ImageBatch:
        """The images as Pictures; those that are Pictures keep what was made of them."""
        return images if isinstance(images, ImageBatch) else cls(images)

    def preprocessed(self, view: ImageTransform) -> Tensor:
        """uint8 (distinct, 3, size, size), on the device of the pictures; on a CPU by all cores.

        Raises:
            ValueError: a picture is not uint8 (3, H, W) with pixels in it.
        """
        if view not in self._squares:
            for number, image in enumerate(self.distinct):
                check_picture(number, image)
            made = for_each(self.distinct, view.of)
            empty = torch.empty(0, 3, view.size, view.size, dtype=torch.uint8)
            self._squares[view] = torch.stack(made) if made else empty
        return self._squares[view]

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
