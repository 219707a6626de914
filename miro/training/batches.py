"""Training batches by position in the sample order: latents, captions, rewards, noise, t.

All randomness of a sample is a function of (seed, position), so a run learns the same however its
steps are split over ranks and micro-batches, and a resumed run continues bit for bit.
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
    """B samples: x and noise (B, C, H, W), t (B,) in [0, 1], all fp32; rewards and captions."""

    x: Tensor
    noise: Tensor
    t: Tensor
    rewards: RewardCond
    text: PackedText

    def to(self, device: torch.device) -> TrainBatch:
        """Copy the batch to `device`."""
        x, noise, t, *rewards = (
            z.to(device, non_blocking=True) for z in (self.x, self.noise, self.t, *self.rewards)
        )
        return TrainBatch(x, noise, t, RewardCond(*rewards), self.text.to(device))


class BatchBuilder:
    """Builds the batches of a run by their position in the sample order.

    Args:
        config: the run.
        dataset: its samples.
        active: (R,) bool, the rewards that the network is conditioned on.
        scores: fp32 (captions, R), raw scores; NaN where missing.
        bins: the quantile bins of each reward.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        active: Tensor,
        scores: np.ndarray,
        bins: Bins,
    ) -> None:
        self.config, self.dataset, self.active = config, dataset, active
        self.loader = Loader(dataset, config.seed, config.batch, config.horizontal_flip)
        self.binned, self.known = (t.view(dataset.scores.shape) for t in bins.assign(scores))
        self.levels = bins.quantile_levels()

    def build(self, position: int, size: int) -> TrainBatch:
        """Build the batch of `size` samples from `position` on, in host memory."""
        config, batch = self.config, self.loader.batch_at(position, size)
        chosen = batch.scores_index, batch.caption_index
        known = self.known[chosen]
        noise, posterior_noise = torch.empty_like(batch.latents), torch.empty_like(batch.latents)
        # Columns: timestep, caption dropout, dropout of each reward, dropout of all rewards.
        uniform = torch.empty(size, 3 + known.shape[1])
        for n in range(size):
            generator = generator_from(config.seed, "visit", position + n)
            uniform[n].uniform_(generator=generator)
            noise[n].normal_(generator=generator)
            if batch.std is not None:
                posterior_noise[n].normal_(generator=generator)
        # Resample the VAE's posterior each time an image is used.
        x = batch.latents if batch.std is None else batch.latents + batch.std * posterior_noise
        keep = keep_rewards(config.conditioning, known, self.active, uniform[:, 2:])
        text = batch.text.keep(keep_text(config.conditioning, uniform[:, 1]))
        t = flow.sample_timesteps(config.flow, uniform[:, 0])
        return TrainBatch(x, noise, t, RewardCond(self.levels, self.binned[chosen], keep), text)

    def prefetch(
        self, plan: BatchPlan, rank: int, images: int
    ) -> Generator[TrainBatch, None, None]:
        """Iterate over the micro-batches of a rank, from the step after `images` images on."""
        starts = (
            position
            for step in itertools.count(images, plan.batch)
            for position in plan.positions(rank, step)
        )
        return prefetch(lambda position: self.build(position, plan.micro_batch), starts)

    def sample_keys(self, plan: BatchPlan, rank: int, images: int) -> list[str]:
        """Return the keys of the samples of a rank in the step after `images` images, in order."""
        return [
            self.dataset.keys[sample]
            for position in plan.positions(rank, images)
            for sample in self.loader.sample_draws(position, plan.micro_batch)[0]
        ]
