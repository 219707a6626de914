"""Base classes of rewards that are neural networks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from miro.images.transforms import ImageTransform
from miro.rewards.base import RewardOptions, check_lengths
from miro.rewards.image_batch import ImageBatch

log = logging.getLogger(__name__)

MAX_CACHED_CAPTIONS = 100_000


class NetworkReward:
    """A `Reward` whose score is computed by one network.

    Attributes:
        transform: Preprocessing of the images; None if the network takes images of any size.
        network: The frozen network, in the dtype of the options.
        device: The device it computes on.
    """

    name: str
    model: str
    reads_caption: bool
    transform: ImageTransform | None = None

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        raise NotImplementedError

    def __init__(self, network: nn.Module, options: RewardOptions) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self._batch_size = options.batch_size
        self.network: Any = network.to(options.dtype).eval().requires_grad_(False)

    @property
    def num_bytes(self) -> int:
        """Size of the parameters and buffers in bytes."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def offload_to_cpu(self) -> None:
        """Move the network to host memory; `in_batches` moves it back."""
        self.network.to("cpu")

    def maybe_compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Apply torch.compile if the options request it."""
        return torch.compile(function) if self.options.compile else function

    def in_batches(self, function: Callable[[int, int], Tensor], count: int) -> Tensor:
        """Concatenate function(start, stop) over batches of range(count).

        The network is moved to its device first. On out-of-memory the batch size is halved, for
        this call and later ones.
        """
        self.network.to(self.device)
        outputs: list[Tensor] = []
        start = 0
        while start < count:
            try:
                outputs.append(function(start, min(start + self._batch_size, count)))
                start += self._batch_size
            except torch.OutOfMemoryError:
                if self._batch_size == 1:
                    raise
                self._batch_size //= 2
                log.warning("%s: out of memory, batch size is now %d", self.name, self._batch_size)
        return torch.cat(outputs)


class DualEncoderReward(NetworkReward):
    """A reward that compares an image embedding with a caption embedding.

    Each distinct image of a batch is embedded once; caption embeddings are cached across batches.
    """

    transform: ImageTransform

    def __init__(self, network: nn.Module, options: RewardOptions) -> None:
        super().__init__(network, options)
        self._caption_cache: dict[str, Tensor] = {}

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed uint8 (n, 3, size, size) on the device as unit vectors, float32 (n, width)."""
        raise NotImplementedError

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions as unit vectors, float32 (m, width), on the device."""
        raise NotImplementedError

    @torch.inference_mode()
    def image_embeddings(self, images: Sequence[Tensor]) -> Tensor:
        """The embedding of each image, float32 (B, width)."""
        batch = ImageBatch.from_images(images)
        preprocessed = batch.preprocessed(self.transform)
        embedded = self.in_batches(
            lambda start, stop: self.embed_images(preprocessed[start:stop].to(self.device)),
            len(preprocessed),
        )
        return embedded[torch.tensor(batch.rows, device=embedded.device)]

    @torch.inference_mode()
    def caption_embeddings(self, captions: Sequence[str]) -> Tensor:
        """The embedding of each caption, float32 (B, width)."""
        cache = self._caption_cache
        new = [caption for caption in dict.fromkeys(captions) if caption not in cache]
        if len(cache) + len(new) > MAX_CACHED_CAPTIONS:
            cache.clear()
            new = list(dict.fromkeys(captions))
        if new:
            embedded = self.in_batches(
                lambda start, stop: self.embed_captions(new[start:stop]), len(new)
            ).cpu()
            cache.update(zip(new, embedded.unbind(), strict=True))
        return torch.stack([cache[caption] for caption in captions]).to(self.device)

    def similarity(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """Cosine similarity of each image and its caption, float32 (B,)."""
        check_lengths(images, captions)
        if not len(images):
            return torch.empty(0, device=self.device)
        return (self.image_embeddings(images) * self.caption_embeddings(captions)).sum(1)
