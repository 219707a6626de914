"""What rewards that are networks share: batches that fit the device, embeddings made once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miro.rewards.base import RewardOptions
from miro.rewards.pictures import Pictures, View, normalised

log = logging.getLogger(__name__)

REMEMBERED = 100_000
"""Captions whose embeddings are kept; they come again with other pictures."""


class NetworkReward:
    """A reward that is one network on a device. See `Reward` for what a subclass adds."""

    name: str
    model: str
    reads_caption: bool
    range: tuple[float, float]
    view: View
    """The squares of the pictures it looks at."""

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

    def leave(self) -> None:
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


@dataclass(frozen=True)
class Towers:
    """A network with a tower for pictures and one for captions, whatever library it is of."""

    model: str
    """Architecture and weights."""
    network: nn.Module
    view: View
    mean: tuple[float, ...]
    std: tuple[float, ...]
    see: Callable[[Tensor], Tensor]
    """Pixels, normalised, in the network's dtype (n, 3, size, size), to features (n, width)."""
    tokens: Callable[[list[str]], tuple[Tensor, ...]]
    """Captions to what `read` takes, on the host."""
    read: Callable[..., Tensor]
    """Tokens to features (n, width)."""
    scale: float
    """What the network multiplies a cosine by to make a logit of it."""


class TwoTowers(NetworkReward):
    """A reward that looks at embeddings of length 1, of pictures and of captions.

    Each distinct picture of a batch and each distinct caption is embedded once. Features are
    brought to length 1 in fp32, whatever the network computes in.
    """

    def __init__(self, towers: Towers, options: RewardOptions) -> None:
        super().__init__(towers.network, options)
        self.model, self.view = towers.model, towers.view
        self._towers = towers
        self._see = self.compiled(towers.see)
        self._texts: dict[str, Tensor] = {}

    def embed_pictures(self, squares: Tensor) -> Tensor:
        """uint8 (n, 3, size, size) on the device to float32 (n, width), of length 1."""
        towers = self._towers
        pixels = normalised(squares, self.options.dtype, towers.mean, towers.std)
        return F.normalize(self._see(pixels).float(), dim=-1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """float32 (m, width), of length 1, on the device."""
        tokens = (part.to(self.device) for part in self._towers.tokens(list(captions)))
        return F.normalize(self._towers.read(*tokens).float(), dim=-1)

    @torch.inference_mode()
    def pictures(self, images: Sequence[Tensor]) -> Tensor:
        """float32 (B, width): the embedding of each image."""
        pictures = Pictures.of(images)
        squares = pictures.squares(self.view)
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
