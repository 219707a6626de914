"""What rewards that are networks share: batches that fit the device, embeddings made once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from miro.images.transforms import ImageTransform
from miro.rewards.base import RewardOptions
from miro.rewards.image_batch import ImageBatch

log = logging.getLogger(__name__)

REMEMBERED = 100_000
"""Captions whose embeddings are kept; they come again with other pictures."""


class NetworkReward:
    """A reward that is one network on a device. See `Reward` for what a subclass adds."""

    name: str
    model: str
    reads_caption: bool
    range: tuple[float, float]
    view: ImageTransform | None = None
    """The squares of the pictures it looks at; None where it looks at the pictures themselves."""

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward`."""
        raise NotImplementedError

    def __init__(self, network: nn.Module, options: RewardOptions) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self._batch = options.batch_size
        self.network: Any = network.to(options.dtype).eval().requires_grad_(False)

    @property
    def bytes(self) -> int:
        """Of the network's parameters and buffers."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def offload_to_cpu(self) -> None:
        """Move the network to the host's memory; it comes back when it is used."""
        self.network.to("cpu")

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, compiled where the options say so; for shapes that repeat."""
        return torch.compile(function) if self.options.compile else function

    def in_batches(self, function: Callable[[int, int], Tensor], count: int) -> Tensor:
        """function(start, stop) over 0 to count, in batches, joined.

        The size is the options', halved for good wherever the device's memory ends. The network
        moves to its device first, if it is not there.
        """
        self.network.to(self.device)
        parts: list[Tensor] = []
        start = 0
        while start < count:
            try:
                parts.append(function(start, min(start + self._batch, count)))
                start += self._batch
            except torch.OutOfMemoryError:
                if self._batch == 1:
                    raise
                self._batch //= 2
                log.warning("%s: no memory left, batches of %d now", self.name, self._batch)
        return torch.cat(parts)


class DualEncoderReward(NetworkReward):
    """A reward that compares an embedding of the picture with one of the caption.

    Each distinct picture of a batch and each distinct caption is embedded once.
    """

    view: ImageTransform

    def __init__(self, network: nn.Module, options: RewardOptions) -> None:
        super().__init__(network, options)
        self._texts: dict[str, Tensor] = {}

    def embed_pictures(self, squares: Tensor) -> Tensor:
        """uint8 (n, 3, size, size) on the device to float32 (n, width), of length 1."""
        raise NotImplementedError

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """float32 (m, width), of length 1, on the device."""
        raise NotImplementedError

    @torch.inference_mode()
    def pictures(self, images: Sequence[Tensor]) -> Tensor:
        """float32 (B, width): the embedding of each image."""
        pictures = ImageBatch.of(images)
        squares = pictures.preprocessed(self.view)
        embedded = self.in_batches(
            lambda start, stop: self.embed_pictures(squares[start:stop].to(self.device)),
            len(squares),
        )
        return embedded[torch.tensor(pictures.rows, device=embedded.device)]

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """float32 (B, width): the embedding of each caption."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        if len(self._texts) + len(new) > REMEMBERED:
            self._texts.clear()
            new = list(dict.fromkeys(captions))
        if new:
            made = self.in_batches(
                lambda start, stop: self.embed_captions(new[start:stop]), len(new)
            ).cpu()
            self._texts.update(zip(new, made.unbind(), strict=True))
        return torch.stack([self._texts[caption] for caption in captions]).to(self.device)

    def similarity(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """float32 (B,): the cosine between each picture and its caption."""
        if len(images) != len(captions):
            raise ValueError(f"got {len(images)} images but {len(captions)} captions")
        if not len(images):
            return torch.empty(0, device=self.device)
        return (self.pictures(images) * self.captions(captions)).sum(1)
