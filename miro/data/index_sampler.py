"""Sample order of a run over several sources and latent shapes, by random access.

A bucket contains the samples of one source and one latent shape. Each bucket has its own endless
stream of samples: one permutation after another, seeded by (seed, bucket, epoch of the bucket), so
its samples are drawn equally often whatever the weight of its source is.

    shape 0   source a ──┐ shuffled epoch by epoch ─▶ cut into batches ──┐
              source b ──┘                                               │ batches of an epoch
    shape 1   source a ──┐                                               │ in random order
              source b ──┘ shuffled epoch by epoch ─▶ cut into batches ──┘

All samples of a global batch have one latent shape, hence so has every micro-batch of it. Samples
that do not fill a batch at the end of an epoch are carried into the next epoch of their shape:
nothing is dropped, and rare shapes are not repeated. A single bucket is its own stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from miro.utils.rng import generator_from

SampleDraws = tuple[np.ndarray, np.ndarray]
"""int64 (n,) sample indices, and int32 (n,) random numbers that choose a caption of each."""

Stream = Callable[[int, int], SampleDraws]
"""(position, size) -> the `size` draws from `position` on."""


@dataclass(frozen=True)
class SourceRange:
    """Samples [start, stop) of a dataset, and their weight relative to the other sources."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True)
class Bucket:
    """int64 (n,) indices of the samples of one source and latent shape, and draws per epoch."""

    samples: np.ndarray
    draws_per_epoch: int


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into integers proportional to `weights`, each at least 1.

    Uses the largest-remainder method.

    Raises:
        ValueError: `total` is smaller than the number of weights.
    """
    if total < len(weights):
        raise ValueError(f"cannot split {total} draws into {len(weights)} parts of at least 1")
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: max(0, total - sum(counts))]:
        counts[i] += 1
    while sum(counts) > total:  # the minimum of 1 overshot the total: reduce the largest count
        counts[max(range(len(counts)), key=lambda i: counts[i])] -= 1
    return counts


def build_buckets(
    shape_index: np.ndarray, source_ranges: Sequence[SourceRange]
) -> list[list[Bucket]]:
    """Group samples by latent shape and source; an epoch has one draw per sample.

    Args:
        shape_index: integers (n,), the latent shape of each sample.
        source_ranges: consecutive ranges that cover all samples.

    Returns:
        The buckets of each latent shape that occurs.

    Raises:
        ValueError: the weight of a source gives it fewer draws than it has shapes.
    """
    shapes = np.unique(shape_index)
    buckets: list[list[Bucket]] = [[] for _ in shapes]
    per_source = apportion(len(shape_index), [source.weight for source in source_ranges])
    for source, draws in zip(source_ranges, per_source, strict=True):
        shape_of_source = shape_index[source.start : source.stop]
        present = [k for k, shape in enumerate(shapes) if (shape_of_source == shape).any()]
        if draws < len(present):
            raise ValueError(
                f"a source of weight {source.weight:g} gets {draws} of the {len(shape_index)} "
                f"draws of an epoch, too few for its {len(present)} latent shapes; raise its weight"
            )
        members = [source.start + np.flatnonzero(shape_of_source == shapes[k]) for k in present]
        per_bucket = apportion(draws, list(map(len, members)))
        for k, samples, count in zip(present, members, per_bucket, strict=True):
            buckets[k].append(Bucket(samples, count))
    return buckets


class IndexSampler:
    """Sample order of a run: a function of (seed, position) alone.

    Args:
        buckets: the buckets of each latent shape, from `build_buckets`.
        seed: seed of the run.
        batch: global batch size; may be None if there is one latent shape only.
    """

    def __init__(self, buckets: Sequence[Sequence[Bucket]], seed: int, batch: int | None) -> None:
        assert batch is not None or len(buckets) == 1
        single = len(buckets) == 1 and len(buckets[0]) == 1
        self.seed, self.batch = seed, batch
        self._streams = [
            _mix_buckets(of_shape, seed, () if single else (k,))
            for k, of_shape in enumerate(buckets)
        ]
        self._draws_per_epoch = [sum(b.draws_per_epoch for b in of_shape) for of_shape in buckets]
        self._epoch_schedule = lru_cache(maxsize=2)(self._shuffle_shapes)

    def draw(self, position: int, size: int) -> SampleDraws:
        """Return the `size` draws from `position` on.

        Raises:
            ValueError: there are several latent shapes and the range crosses a global batch.
        """
        if len(self._streams) == 1:
            return self._streams[0](position, size)
        assert self.batch is not None
        batch_index, offset = divmod(position, self.batch)
        if offset + size > self.batch:
            raise ValueError(
                f"positions {position} to {position + size} cross a batch of {self.batch}, and "
                "two batches may differ in latent shape"
            )
        shape, index_in_shape = self._locate_batch(batch_index)
        return self._streams[shape](index_in_shape * self.batch + offset, size)

    def _locate_batch(self, batch_index: int) -> tuple[int, int]:
        """The latent shape of a batch, and its index among the batches of that shape."""
        assert self.batch is not None
        # Samples carried over make the estimate early by < 1 batch per shape, never late.
        epoch = batch_index * self.batch // sum(self._draws_per_epoch)
        while sum(self._batches_before(epoch + 1)) <= batch_index:
            epoch += 1
        before, schedule = self._batches_before(epoch), self._epoch_schedule(epoch)
        index_in_epoch = batch_index - sum(before)
        shape = int(schedule[index_in_epoch])
        return shape, before[shape] + int((schedule[:index_in_epoch] == shape).sum())

    def _batches_before(self, epoch: int) -> list[int]:
        """Number of whole batches of each latent shape before an epoch."""
        assert self.batch is not None
        return [epoch * draws // self.batch for draws in self._draws_per_epoch]

    def _shuffle_shapes(self, epoch: int) -> np.ndarray:
        """int64 (batches of the epoch,): the latent shape of each."""
        counts = np.subtract(self._batches_before(epoch + 1), self._batches_before(epoch))
        shapes = np.repeat(np.arange(len(counts)), counts)
        order = torch.randperm(len(shapes), generator=generator_from(self.seed, "shapes", epoch))
        return shapes[order.numpy()]


def _mix_buckets(buckets: Sequence[Bucket], seed: int, stream_id: tuple[int, ...]) -> Stream:
    """The stream of one latent shape: the draws of its buckets, shuffled epoch by epoch."""
    if len(buckets) == 1:
        return _permute(buckets[0].samples, seed, stream_id)
    streams = [_permute(b.samples, seed, (*stream_id, k)) for k, b in enumerate(buckets)]

    def draw_epoch(epoch: int) -> SampleDraws:
        parts = [
            stream(epoch * bucket.draws_per_epoch, bucket.draws_per_epoch)
            for stream, bucket in zip(streams, buckets, strict=True)
        ]
        samples, draws = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        generator = generator_from(seed, "mix", *stream_id, epoch)
        order = torch.randperm(len(samples), generator=generator)
        return samples[order.numpy()], draws[order.numpy()]

    return _concatenate_epochs(draw_epoch, sum(bucket.draws_per_epoch for bucket in buckets))


def _permute(samples: np.ndarray, seed: int, stream_id: tuple[int, ...]) -> Stream:
    """The stream of one bucket: a new permutation of `samples` in each epoch."""

    def draw_epoch(epoch: int) -> SampleDraws:
        n = len(samples)
        order = torch.randperm(n, generator=generator_from(seed, "order", *stream_id, epoch))
        captions = generator_from(seed, "captions", *stream_id, epoch)
        draws = torch.randint(2**31 - 1, (n,), generator=captions, dtype=torch.int32).numpy()
        return samples[order.numpy()], draws

    return _concatenate_epochs(draw_epoch, len(samples))


def _concatenate_epochs(draw_epoch: Callable[[int], SampleDraws], length: int) -> Stream:
    """An endless stream of epochs of `length` draws each."""
    # A batch touches one epoch, or two at their boundary.
    cached_epoch = lru_cache(maxsize=2)(draw_epoch)

    def draw(position: int, size: int) -> SampleDraws:
        samples, draws = [], []
        while size:
            epoch, offset = divmod(position, length)
            epoch_samples, epoch_draws = cached_epoch(epoch)
            part = slice(offset, offset + size)
            samples.append(epoch_samples[part])
            draws.append(epoch_draws[part])
            position, size = position + len(samples[-1]), size - len(samples[-1])
        return np.concatenate(samples), np.concatenate(draws)

    return draw
