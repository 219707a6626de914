"""From the items of a unit to samples with scores: decoded in batches, scored, judged, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miro.images.decoder import DecodeError, Decoder, prefetch_decoded
from miro.rewards.base import Reward
from miro.rewards.scorer import Offload, ScoreBatch, Scorer
from miro.sources.sample import RawSample, RejectedSample


@dataclass(frozen=True)
class ScoringConfig:
    """How samples are decoded and scored, and with how much of the machine."""

    batch_size: int
    decoder: Decoder
    device: torch.device
    offload: Offload
    window: int


@dataclass(frozen=True)
class Outcome:
    """What became of an item.

    A sample with its scores, float32 (captions, rewards); a sample that cannot be used, and why; or
    what is no sample at all, and why.
    """

    sample: RawSample | None
    scores: np.ndarray | None
    rejection: RejectedSample | None

    @property
    def whole(self) -> bool:
        """Whether it counts as a sample, and not as one caption of several."""
        return self.rejection is None or self.rejection.whole


def scored(
    unit: Iterable[RawSample | RejectedSample], rewards: Sequence[Reward], config: ScoringConfig
) -> Iterator[list[Outcome]]:
    """The outcomes of a unit, batch by batch, in its order.

    Three batches of decoded images are in memory. Where networks take turns, the squares that they
    look at are too, of `window` samples.
    """
    scorer = Scorer(rewards, config.device, config.offload)
    size = config.window if scorer.offloads else 1
    window: list[_Batch] = []
    held = 0
    for decoded in prefetch_decoded(unit, _image_of, config.batch_size, config.decoder):
        batch = _Batch(decoded)
        scorer.begin(batch.pairs)
        window.append(batch)
        held += len(decoded)
        if held >= size:
            yield from _finished(scorer, window)
            window, held = [], 0
    yield from _finished(scorer, window)


def _finished(scorer: Scorer, window: list[_Batch]) -> Iterator[list[Outcome]]:
    scorer.finish([batch.pairs for batch in window])
    for batch in window:
        yield batch.outcomes()


class _Batch:
    """A decoded batch: what of it can be scored, and what of it cannot."""

    def __init__(
        self, decoded: list[tuple[RawSample | RejectedSample, Tensor | DecodeError | None]]
    ) -> None:
        self._judged = [_judge(item, image) for item, image in decoded]
        images = [image for _, image in decoded if isinstance(image, Tensor)]
        captions = [s.captions for s, rejection in self._judged if s and not rejection]
        self.pairs = ScoreBatch(images, captions)

    def outcomes(self) -> list[Outcome]:
        scores = iter(self.pairs.by_image())
        return [
            Outcome(sample, next(scores) if rejection is None else None, rejection)
            for sample, rejection in self._judged
        ]


def _judge(
    item: RawSample | RejectedSample, image: Tensor | DecodeError | None
) -> tuple[RawSample | None, RejectedSample | None]:
    if isinstance(item, RejectedSample):
        return None, item
    if isinstance(image, Tensor):
        return item, None
    return item, RejectedSample(item.origin, "image", str(image))


def _image_of(item: RawSample | RejectedSample) -> bytes | None:
    return item.image if isinstance(item, RawSample) else None
