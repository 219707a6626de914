"""What a run learns from, visit by visit: an image, a caption, its rewards, noise and a time.

A visit is a position of the row that the loader reads. All that is random of it is a function of
(seed, position), so a run learns the same however its steps are cut among ranks and micro-batches,
and a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miro import flow
from miro.conditioning import Bins, keep_rewards, keep_text
from miro.data.dataset_base import Dataset
from miro.data.loader import Loader, prefetch
from miro.model.packed_text import PackedText
from miro.model.transformer import RewardCond
from miro.training.batch_plan import BatchPlan
from miro.training.config import TrainConfig
from miro.utils.rng import generator_from


@dataclass(frozen=True)
class TrainBatch:
    """B visits at once: x and noise (B, C, H, W), t (B,) in [0, 1], all fp32."""

    x: Tensor
    noise: Tensor
    t: Tensor
    rewards: RewardCond
    text: PackedText

    def to(self, device: torch.device) -> TrainBatch:
        """The same on `device`."""
        x, noise, t, *rewards = (
            z.to(device, non_blocking=True) for z in (self.x, self.noise, self.t, *self.rewards)
        )
        return TrainBatch(x, noise, t, RewardCond(*rewards), self.text.to(device))


class BatchBuilder:
    """The visits of a run by their position.

    Args:
        trained: (R,) bool, the rewards the network is told.
        scores: fp32 (pairs, R) raw scores, NaN where not known, and bins their ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        trained: Tensor,
        scores: np.ndarray,
        bins: Bins,
    ) -> None:
        self.config, self.dataset, self.trained = config, dataset, trained
        self.loader = Loader(dataset, config.seed, config.batch, config.mirror)
        self.binned, self.known = (t.view(dataset.scores.shape) for t in bins.assign(scores))
        self.levels = bins.quantile_levels()

    def at(self, position: int, size: int) -> TrainBatch:
        """The `size` visits from `position` on, in the host's memory."""
        config, batch = self.config, self.loader.batch_at(position, size)
        chosen = batch.scores_index, batch.caption_index
        known = self.known[chosen]
        noise, shake = torch.empty_like(batch.latents), torch.empty_like(batch.latents)
        # For the time, the text, each reward, and all rewards together.
        uniform = torch.empty(size, 3 + known.shape[1])
        for n in range(size):
            own = generator_from(config.seed, "visit", position + n)
            uniform[n].uniform_(generator=own)
            noise[n].normal_(generator=own)
            if batch.std is not None:
                shake[n].normal_(generator=own)
        # The autoencoder's posterior is drawn anew at each visit.
        x = batch.latents if batch.std is None else batch.latents + batch.std * shake
        keep = keep_rewards(config.conditioning, known, self.trained, uniform[:, 2:])
        text = batch.text.keep(keep_text(config.conditioning, uniform[:, 1]))
        t = flow.sample_timesteps(config.flow, uniform[:, 0])
        return TrainBatch(x, noise, t, RewardCond(self.levels, self.binned[chosen], keep), text)

    def ahead(self, layout: BatchPlan, rank: int, images: int) -> Generator[TrainBatch, None, None]:
        """The micro-batches of a rank from the step on that begins after `images` images."""
        starts = (
            position
            for step in itertools.count(images, layout.batch)
            for position in layout.positions(rank, step)
        )
        return prefetch(lambda at: self.at(at, layout.micro_batch), starts)

    def keys(self, layout: BatchPlan, rank: int, images: int) -> list[str]:
        """The names of the samples that a rank reads in that step, in order."""
        return [
            self.dataset.keys[sample]
            for position in layout.positions(rank, images)
            for sample in self.loader.sample_draws(position, layout.micro_batch)[0]
        ]
