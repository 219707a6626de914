"""Batches of a `Dataset` as a pure function of (seed, position).

The training set is an endless sequence of samples, epoch after epoch in a new order (see
`miro.data.index_sampler`). A step that starts after `images` images reads on from that position,
split among ranks and micro-batches. So the loader has no state to save, and a run that resumes at
another world size reads the same sequence. Shards are memory-mapped: a batch is one copy out of the
page cache, without worker processes.
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

from miro.data.dataset_base import Dataset
from miro.data.index_sampler import IndexSampler, build_buckets
from miro.model.packed_text import PackedText
from miro.utils.rng import seed_from

T = TypeVar("T")


@dataclass
class Batch:
    """B samples of one latent shape with one caption each, on the CPU.

    `dataset.scores[scores_index, caption_index]` are the scores of these pairs.
    """

    keys: list[str]
    latents: Tensor  # float32 (B, C, H, W), the posterior mean if the dataset has posteriors
    std: Tensor | None  # float32 (B, C, H, W), the posterior standard deviation
    text: PackedText  # text states, float16 as stored
    scores_index: Tensor  # int64 (B,) sample indices
    caption_index: Tensor  # int64 (B,) indices in `dataset.caption_types`

    def __len__(self) -> int:
        return len(self.keys)


class Loader:
    """Random access to the sample sequence of a run; a batch may be larger than the dataset.

    Args:
        dataset: the training data.
        seed: seed of the run.
        batch: global batch size; may be None if all samples have one latent shape.
        horizontal_flip: flip half of the images, chosen by (seed, position); needs images that are
            encoded on the fly.
    """

    def __init__(
        self, dataset: Dataset, seed: int, batch: int | None = None, horizontal_flip: bool = False
    ) -> None:
        self.dataset, self.seed, self.horizontal_flip = dataset, seed, horizontal_flip
        buckets = build_buckets(dataset.shape_index, dataset.source_ranges)
        self._sampler = IndexSampler(buckets, seed, batch)

    def sample_draws(self, position: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sample indices and caption types, int64 (size,) each, from `position` on.

        Raises:
            ValueError: position or size is out of range, or the range crosses a global batch where
                samples differ in latent shape.
        """
        if position < 0 or size < 1:
            raise ValueError(
                f"position must be at least 0 and size at least 1, got {position}, {size}"
            )
        samples, draws = self._sampler.draw(position, size)
        return samples, self.dataset.select_captions(samples, draws)

    def batch_at(self, position: int, size: int) -> Batch:
        """Load the `size` samples from `position` on; raises what `sample_draws` raises."""
        data = self.dataset
        samples, captions = self.sample_draws(position, size)
        latents = torch.from_numpy(data.latents(samples, self._flip(position, size)))
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

    def _flip(self, position: int, size: int) -> np.ndarray | None:
        """Which images are flipped horizontally, bool (size,)."""
        if not self.horizontal_flip:
            return None
        seeds = (seed_from(self.seed, "mirror", position + n) for n in range(size))
        return np.array([bool(seed & 1) for seed in seeds])


def prefetch(
    load: Callable[[int], T], positions: Iterable[int], depth: int = 2
) -> Generator[T, None, None]:
    """Yield load(position) of each position, computed up to `depth` ahead by one thread.

    An exception in the thread is raised at the position that caused it. Closing or deleting the
    generator ends the thread.
    """
    remaining = iter(positions)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="miro-loader") as thread:
        pending = deque(thread.submit(load, at) for at in itertools.islice(remaining, depth))
        try:
            while pending:
                loaded = pending.popleft().result()
                pending.extend(thread.submit(load, at) for at in itertools.islice(remaining, 1))
                yield loaded
        finally:
            thread.shutdown(cancel_futures=True)
