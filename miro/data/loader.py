"""Batches of an encoded dataset, as a pure function of (seed, position).

The training set is read as an endless row: epoch after epoch, each a permutation of all samples
drawn from (seed, epoch). A step that begins after `images` images reads the row from there on, cut
among ranks and micro-batches. So a resumed run needs no state of the loader, and a run that goes on
at another world size reads the same row. Shards are memory-mapped: a batch is one copy out of the
page cache, no worker processes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from miro.data.encoded import EncodedDataset
from miro.random import generator_from
from miro.text import PackedText

__all__ = ["Batch", "EncodedDataset", "Loader"]

T = TypeVar("T")


@dataclass
class Batch:
    """What is learned from at a time.

    keys: of the B samples; latents: float32 (B, C, H, W), the posterior's mean where there is one;
    std: float32 (B, C, H, W), its standard deviation, or None;
    text: the states of one caption of each sample, float16 as stored (`text.to(device, dtype)`);
    scores_index: int64 (B,) sample, and caption_index: int64 (B,) caption kind, so that
    `dataset.scores[scores_index, caption_index]` are the scores of exactly these pairs.
    """

    keys: list[str]
    latents: Tensor
    std: Tensor | None
    text: PackedText
    scores_index: Tensor
    caption_index: Tensor

    def __len__(self) -> int:
        return len(self.keys)


class Loader:
    """Random access to the row of a run: `batch_at(position, size)` depends on nothing else.

    A data set smaller than a batch is read around.
    """

    def __init__(self, dataset: EncodedDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # A batch touches one epoch, or two at their seam.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's samples in their order, and the caption kind of each visit; int64 (n,)."""
        n = len(self.dataset)
        order = torch.randperm(n, generator=generator_from(self.seed, "order", epoch)).numpy()
        draws = generator_from(self.seed, "captions", epoch)
        chosen = torch.randint(2**31 - 1, (n,), generator=draws, dtype=torch.int32).numpy()
        return order, self.dataset.choose_captions(order, chosen)

    def visits_at(self, position: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, caption kinds), int64 (size,) each, of the row from `position` on."""
        if position < 0 or size < 1:
            raise ValueError(f"position must not be negative and size above 0: {position}, {size}")
        at, left = position, size
        samples, captions = [], []
        while left:
            epoch, offset = divmod(at, len(self.dataset))
            order, kinds = self._epoch(epoch)
            take = slice(offset, offset + left)
            samples.append(order[take])
            captions.append(kinds[take])
            at, left = at + len(samples[-1]), left - len(samples[-1])
        return np.concatenate(samples), np.concatenate(captions)

    def batch_at(self, position: int, size: int) -> Batch:
        """The `size` visits of the row from `position` on."""
        data = self.dataset
        samples, captions = self.visits_at(position, size)
        shape = (
            (len(samples), 2, *data.latent_shape)
            if data.has_std
            else (len(samples), *data.latent_shape)
        )
        latents = np.empty(shape, np.float32)
        np.stack([data.latent(i) for i in samples], out=latents)
        texts = [data.text(i, c) for i, c in zip(samples, captions, strict=True)]
        offsets = np.zeros(len(texts) + 1, np.int32)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        tensor = torch.from_numpy(latents)
        return Batch(
            keys=[data.keys[i] for i in samples],
            latents=tensor[:, 0].contiguous() if data.has_std else tensor,
            std=tensor[:, 1].contiguous() if data.has_std else None,
            text=PackedText(
                torch.from_numpy(np.concatenate(texts)),
                torch.from_numpy(offsets),
                int(np.diff(offsets).max()),
            ),
            scores_index=torch.from_numpy(samples),
            caption_index=torch.from_numpy(captions),
        )


def made_ahead(
    make: Callable[[int], T], positions: Iterable[int], depth: int = 2
) -> Generator[T, None, None]:
    """make(position) of each, made ahead by one thread.

    An error in the thread is raised here, at the position it belongs to. `close()`, or letting go
    of the generator, ends the thread.
    """
    coming = iter(positions)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="miro-loader") as thread:
        ahead = deque(thread.submit(make, at) for at in itertools.islice(coming, depth))
        try:
            while ahead:
                made = ahead.popleft().result()
                ahead.extend(thread.submit(make, at) for at in itertools.islice(coming, 1))
                yield made
        finally:
            thread.shutdown(cancel_futures=True)
