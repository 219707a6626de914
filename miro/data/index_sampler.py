"""In which order the samples of a data set are visited, where they come in several kinds.

A stratum is a set of samples that a run visits a fixed number of times an epoch: those of one
source and one shape. Each has an endless row of its own, permutation after permutation drawn from
(seed, stratum, its own epoch), so its samples are visited equally often whatever its share is.

    shape 0   source a ──┐ mixed, an epoch at a time ─▶ cut into batches ──┐
              source b ──┘                                                 │ batches of an epoch
    shape 1   source a ──┐                                                 │ in a random order
              source b ──┘ mixed, an epoch at a time ─▶ cut into batches ──┘

A batch is that of a whole step and of one shape, so any cut of it among ranks and micro-batches is.
What is left of a shape when an epoch is cut into batches goes into its next epoch: nothing is
dropped, and a rare shape is not repeated to fill a batch. Of one stratum the row is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from miro.utils.rng import generator_from

SampleDraws = tuple[np.ndarray, np.ndarray]  # int64 (n,) samples, and a random number for each


@dataclass(frozen=True)
class SourceRange:
    """A source's samples of a data set, [start, stop), and its weight beside the other sources."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True)
class Bucket:
    """int64 (n,) samples of one source and one shape, and how many of them an epoch visits."""

    samples: np.ndarray
    visits: int


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole numbers in proportion to `weights`, at least 1 each (largest remainders).

    ValueError where `total` is less than the number of weights.
    """
    if total < len(weights):
        raise ValueError(f"{total} visits do not divide among {len(weights)}")
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [max(1, int(part)) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: max(0, total - sum(whole))]:
        whole[i] += 1
    while sum(whole) > total:  # What the least got at least, the most give.
        whole[max(range(len(whole)), key=lambda i: whole[i])] -= 1
    return whole


def build_buckets(shape_of: np.ndarray, parts: Sequence[SourceRange]) -> list[list[Bucket]]:
    """The strata of each shape that occurs; an epoch has as many visits as there are samples.

    Args:
        shape_of: (n,) integers, each sample's shape.
        parts: the sources, one after another.

    Raises:
        ValueError: a source is too light to be visited.
    """
    shapes = np.unique(shape_of)
    found: list[list[Bucket]] = [[] for _ in shapes]
    visits = apportion(len(shape_of), [part.weight for part in parts])
    for part, count in zip(parts, visits, strict=True):
        own = shape_of[part.start : part.stop]
        there = [k for k, shape in enumerate(shapes) if (own == shape).any()]
        if count < len(there):
            raise ValueError(
                f"a source of weight {part.weight:g} has {count} of the {len(shape_of)} visits of "
                f"an epoch, too few for its {len(there)} shapes; give it more weight"
            )
        members = [part.start + np.flatnonzero(own == shapes[k]) for k in there]
        for k, samples, n in zip(
            there, members, apportion(count, list(map(len, members))), strict=True
        ):
            found[k].append(Bucket(samples, n))
    return found


class IndexSampler:
    """The visits of a run in their order; a function of (seed, position) alone.

    Args:
        strata: of each shape.
        batch: images of a step, which are of one shape; needed where there are several.
    """

    def __init__(self, strata: Sequence[Sequence[Bucket]], seed: int, batch: int | None) -> None:
        assert batch is not None or len(strata) == 1
        single = len(strata) == 1 and len(strata[0]) == 1
        self.seed, self.batch = seed, batch
        self._rows = [_mixed(shape, seed, () if single else (k,)) for k, shape in enumerate(strata)]
        self._visits = [sum(stratum.visits for stratum in shape) for shape in strata]
        self._schedule = lru_cache(maxsize=2)(self._draw_schedule)

    def at(self, position: int, size: int) -> SampleDraws:
        """The `size` visits from `position` on; of several shapes, inside one batch."""
        if len(self._rows) == 1:
            return self._rows[0](position, size)
        assert self.batch is not None
        number, offset = divmod(position, self.batch)
        if offset + size > self.batch:
            raise ValueError(
                f"visits {position} to {position + size} are not of one batch of {self.batch}, "
                "and may be of two shapes"
            )
        shape, own = self._batch(number)
        return self._rows[shape](own * self.batch + offset, size)

    def _batch(self, number: int) -> tuple[int, int]:
        """The shape of a batch, and which of that shape's batches it is."""
        assert self.batch is not None
        # Never behind it, and before it by less than a batch of each shape.
        epoch = number * self.batch // sum(self._visits)
        while sum(self._begun(epoch + 1)) <= number:
            epoch += 1
        begun, schedule = self._begun(epoch), self._schedule(epoch)
        place = number - sum(begun)
        shape = int(schedule[place])
        return shape, begun[shape] + int((schedule[:place] == shape).sum())

    def _begun(self, epoch: int) -> list[int]:
        """Batches of each shape in the epochs before."""
        assert self.batch is not None
        return [epoch * visits // self.batch for visits in self._visits]

    def _draw_schedule(self, epoch: int) -> np.ndarray:
        """The shape of each batch of an epoch."""
        counts = np.subtract(self._begun(epoch + 1), self._begun(epoch))
        shapes = np.repeat(np.arange(len(counts)), counts)
        order = torch.randperm(len(shapes), generator=generator_from(self.seed, "shapes", epoch))
        return shapes[order.numpy()]


def _mixed(strata: Sequence[Bucket], seed: int, own: tuple[int, ...]) -> Callable[..., SampleDraws]:
    """(position, size) to the visits of the strata of one shape."""
    if len(strata) == 1:
        return _permutations(strata[0].samples, seed, own)
    rows = [_permutations(stratum.samples, seed, (*own, k)) for k, stratum in enumerate(strata)]

    def draw(epoch: int) -> SampleDraws:
        parts = [
            row(epoch * stratum.visits, stratum.visits)
            for row, stratum in zip(rows, strata, strict=True)
        ]
        samples, draws = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = torch.randperm(len(samples), generator=generator_from(seed, "mix", *own, epoch))
        return samples[order.numpy()], draws[order.numpy()]

    return _endless(draw, sum(stratum.visits for stratum in strata))


def _permutations(
    samples: np.ndarray, seed: int, own: tuple[int, ...]
) -> Callable[..., SampleDraws]:
    """(position, size) to visits of `samples`, in another order each time round."""

    def draw(epoch: int) -> SampleDraws:
        n = len(samples)
        order = torch.randperm(n, generator=generator_from(seed, "order", *own, epoch)).numpy()
        captions = generator_from(seed, "captions", *own, epoch)
        drawn = torch.randint(2**31 - 1, (n,), generator=captions, dtype=torch.int32).numpy()
        return samples[order], drawn

    return _endless(draw, len(samples))


def _endless(draw: Callable[[int], SampleDraws], length: int) -> Callable[..., SampleDraws]:
    """(position, size) to visits of a row made of epochs of one length."""
    # A batch touches one epoch, or two at their seam.
    epoch_of = lru_cache(maxsize=2)(draw)

    def at(position: int, size: int) -> SampleDraws:
        samples, draws = [], []
        while size:
            epoch, offset = divmod(position, length)
            order, drawn = epoch_of(epoch)
            take = slice(offset, offset + size)
            samples.append(order[take])
            draws.append(drawn[take])
            position, size = position + len(samples[-1]), size - len(samples[-1])
        return np.concatenate(samples), np.concatenate(draws)

    return at
