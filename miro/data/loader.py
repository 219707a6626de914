"""Batches of an encoded dataset, as a pure function of (seed, position).

The training set is read as an endless row: epoch after epoch, each a permutation of all samples
drawn from (seed, epoch); `miro.data.index_sampler` says what it is of several sources and shapes. A step
that begins after `images` images reads the row from there on, cut among ranks and micro-batches. So
a resumed run needs no state of the loader, and a run that goes on at another world size reads the
same row. Shards are memory-mapped: a batch is one copy out of the page cache, no worker processes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from miro.data.index_sampler import IndexSampler, build_buckets
from miro.data.mixture import TrainingData
from miro.data.reader import EncodedDataset
from miro.model.packed_text import PackedText
from miro.utils.rng import seed_from

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

    def __init__(
        self, dataset: TrainingData, seed: int, batch: int | None = None, mirror: bool = False
    ) -> None:
        """batch: images of a step, which are of one shape; needed where there are several.

        mirror: half of the visits, drawn by their position, see the image in a mirror.
        """
        self.dataset, self.seed, self.mirror = dataset, seed, mirror
        self._row = IndexSampler(build_buckets(dataset.shape_of, dataset.parts), seed, batch)

    def sample_draws(self, position: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, caption kinds), int64 (size,) each, of the row from `position` on."""
        if position < 0 or size < 1:
            raise ValueError(f"position must not be negative and size above 0: {position}, {size}")
        samples, draws = self._row.at(position, size)
        return samples, self.dataset.choose_captions(samples, draws)

    def batch_at(self, position: int, size: int) -> Batch:
        """The `size` visits of the row from `position` on; of several shapes, of one batch."""
        data = self.dataset
        samples, captions = self.sample_draws(position, size)
        latents = torch.from_numpy(data.latents(samples, self._mirrored(position, size)))
        texts = data.texts(samples, captions)
        offsets = np.zeros(len(texts) + 1, np.int32)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        return Batch(
            keys=[data.keys[i] for i in samples],
            latents=latents[:, 0].contiguous() if data.has_std else latents,
            std=latents[:, 1].contiguous() if data.has_std else None,
            text=PackedText(
                torch.from_numpy(np.concatenate(texts)),
                torch.from_numpy(offsets),
                int(np.diff(offsets).max()),
            ),
            scores_index=torch.from_numpy(samples),
            caption_index=torch.from_numpy(captions),
        )

    def _mirrored(self, position: int, size: int) -> np.ndarray | None:
        if not self.mirror:
            return None
        seeds = (seed_from(self.seed, "mirror", position + n) for n in range(size))
        return np.array([bool(seed & 1) for seed in seeds])


def prefetch(
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
