"""Batches of an encoded dataset, as a pure function of (seed, rank, world, images).

The training set is read as an endless row: epoch after epoch, each a permutation of all samples
drawn from (seed, epoch). A step that begins at `images` reads the batch_size * world positions from
there on, and rank r its own contiguous slice of them. So a resumed run needs no state of the
loader, and a run that goes on at another world size reads the same row. Shards are memory-mapped: a
batch is one copy out of the page cache, no worker processes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from miro.data.encoded import EncodedDataset
from miro.random import generator_from
from miro.text import PackedText

__all__ = ["Batch", "EncodedDataset", "Loader"]


@dataclass
class Batch:
    """One rank's part of a step.

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
    """Random access to the batches of a run: `batch_at(images)` depends on nothing else.

    batch_size: samples a rank reads at a time. A data set smaller than a step is read around.
    """

    def __init__(
        self, dataset: EncodedDataset, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to world - 1 = {world - 1}, got {rank}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        # A batch touches one epoch, or two at their seam.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's samples in their order, and the caption kind of each visit; int64 (n,)."""
        n = len(self.dataset)
        order = torch.randperm(n, generator=generator_from(self.seed, "order", epoch)).numpy()
        draws = generator_from(self.seed, "captions", epoch)
        chosen = torch.randint(2**31 - 1, (n,), generator=draws, dtype=torch.int32).numpy()
        return order, self.dataset.choose_captions(order, chosen)

    def visits_at(self, images: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, caption kinds), int64 (batch_size,) each, of this rank's part of a step."""
        if images < 0:
            raise ValueError(f"images must not be negative, got {images}")
        at, left = images + self.rank * self.batch_size, self.batch_size
        samples, captions = [], []
        while left:
            epoch, offset = divmod(at, len(self.dataset))
            order, kinds = self._epoch(epoch)
            take = slice(offset, offset + left)
            samples.append(order[take])
            captions.append(kinds[take])
            at, left = at + len(samples[-1]), left - len(samples[-1])
        return np.concatenate(samples), np.concatenate(captions)

    def batch_at(self, images: int) -> Batch:
        """This rank's batch of the step that begins after `images` images of all ranks."""
        data = self.dataset
        samples, captions = self.visits_at(images)
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

    def prefetch(self, start: int, step: int, depth: int = 2) -> Generator[Batch, None, None]:
        """batch_at(start), batch_at(start + step), ... without end, made ahead by one thread.

        An error in the thread is raised here, at the batch it belongs to. `close()`, or letting go
        of the generator, ends the thread.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="miro-loader") as thread:
            ahead = deque(thread.submit(self.batch_at, start + step * k) for k in range(depth))
            try:
                for k in itertools.count(depth):
                    batch = ahead.popleft().result()
                    ahead.append(thread.submit(self.batch_at, start + step * k))
                    yield batch
            finally:
                thread.shutdown(cancel_futures=True)
