"""Decoding and scoring of a stream of samples, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miro.images.decoder import DecodeError, Decoder, prefetch_decoded
from miro.prepare.shard_samples import image_of
from miro.rewards.base import Reward
from miro.rewards.scorer import Offload, ScoreBatch, Scorer
from miro.sources.sample import RawSample, RejectedSample


@dataclass(frozen=True)
class ScoringConfig:
    """Batching, decoder and device of scoring."""

    batch_size: int
    decoder: Decoder
    device: torch.device
    offload: Offload
    window: int  # samples decoded before offloaded networks score them


@dataclass(frozen=True)
class ScoringResult:
    """A sample and its scores, or the reason why it has none."""

    sample: RawSample | None  # None if it cannot be read
    scores: np.ndarray | None  # float32 (captions, rewards)
    rejection: RejectedSample | None

    @property
    def whole(self) -> bool:
        """Whether it counts as a sample, rather than one rejected caption of several."""
        return self.rejection is None or self.rejection.whole


def score_samples(
    samples: Iterable[RawSample | RejectedSample], rewards: Sequence[Reward], config: ScoringConfig
) -> Iterator[list[ScoringResult]]:
    """Decode and score samples, and yield the results of each batch in order.

    Three batches of decoded images are in memory; with offloading also the preprocessed images of
    `window` samples.
    """
    scorer = Scorer(rewards, config.device, config.offload)
    size = config.window if scorer.offloads else 1
    window: list[_Batch] = []
    count = 0
    for decoded in prefetch_decoded(samples, image_of, config.batch_size, config.decoder):
        batch = _Batch(decoded)
        scorer.begin(batch.pairs)
        window.append(batch)
        count += len(decoded)
        if count >= size:
            yield from _finish(scorer, window)
            window, count = [], 0
    yield from _finish(scorer, window)


def _finish(scorer: Scorer, window: list[_Batch]) -> Iterator[list[ScoringResult]]:
    scorer.finish([batch.pairs for batch in window])
    for batch in window:
        yield batch.results()


class _Batch:
    """A decoded batch; `pairs` are its valid images and their captions."""

    def __init__(
        self, decoded: list[tuple[RawSample | RejectedSample, Tensor | DecodeError | None]]
    ) -> None:
        self._samples = [_check_decoded(sample, image) for sample, image in decoded]
        images = [image for _, image in decoded if isinstance(image, Tensor)]
        captions = [s.captions for s, rejection in self._samples if s and not rejection]
        self.pairs = ScoreBatch(images, captions)

    def results(self) -> list[ScoringResult]:
        scores = iter(self.pairs.by_image())
        return [
            ScoringResult(sample, next(scores) if rejection is None else None, rejection)
            for sample, rejection in self._samples
        ]


def _check_decoded(
    sample: RawSample | RejectedSample, image: Tensor | DecodeError | None
) -> tuple[RawSample | None, RejectedSample | None]:
    if isinstance(sample, RejectedSample):
        return None, sample
    if isinstance(image, Tensor):
        return sample, None
    return sample, RejectedSample(sample.origin, "image", str(image))
