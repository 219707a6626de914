"""Scores of decoded pictures by several rewards, all at once or in turns on the device.

Where the networks of all rewards fit the device, each batch meets all of them. Where they do not,
many batches are decoded first, of each picture only what is looked at is kept, and one network
after the other comes to the device and scores them all: nothing is decoded twice.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from miro.rewards.base import Reward
from miro.rewards.image_batch import ImageBatch
from miro.rewards.network import NetworkReward

log = logging.getLogger(__name__)

Offload = Literal["auto", "always", "never"]
SHARE = 0.7
"""Of the device's free memory that weights may take; batches need the rest."""


class ScoreBatch:
    """A batch of decoded images, each with its captions by kind, and the scores they get.

    scores: float32 (pairs, rewards), a row per image and caption; NaN where not known.
    """

    def __init__(self, images: Sequence[Tensor], captions: Sequence[Mapping[str, str]]) -> None:
        assert len(images) == len(captions)
        self.counts = [len(kinds) for kinds in captions]
        self.rows = np.repeat(np.arange(len(images)), self.counts)
        self.texts = [text for kinds in captions for text in kinds.values()]
        self.firsts = [next(iter(kinds.values())) for kinds in captions]
        self.pictures = ImageBatch(images)
        self.scores = np.empty((len(self.rows), 0), np.float32)

    def by_image(self) -> list[np.ndarray]:
        """The scores of each image: float32 (its captions, rewards)."""
        return np.split(self.scores, np.cumsum(self.counts)[:-1]) if self.counts else []

    def column(self, reward: Reward) -> np.ndarray:
        """float32 (pairs,): what the reward gives; what is not finite is NaN.

        Raises:
            ValueError: the reward gave another number of scores.
        """
        if not self.texts:
            return np.empty(0, np.float32)
        if reward.reads_caption:
            found = reward.score(self.pictures.take(self.rows), self.texts)
        else:
            found = reward.score(self.pictures, self.firsts)
        expected = len(self.texts if reward.reads_caption else self.firsts)
        if tuple(found.shape) != (expected,):
            raise ValueError(
                f"the reward {reward.name!r} gave {tuple(found.shape)} for {expected} pairs"
            )
        values = found.detach().float().cpu().numpy()
        values = values.copy() if reward.reads_caption else values[self.rows]
        values[~np.isfinite(values)] = np.nan
        return values


class Scorer:
    """Fills `Pairs.scores`, a column for each of `rewards` in their order."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        device: torch.device,
        turns: Offload = "auto",
    ) -> None:
        """turns: whether networks take turns on the device; auto where they do not fit it."""
        self.rewards = list(rewards)
        networks = {
            column: reward
            for column, reward in enumerate(self.rewards)
            if isinstance(reward, NetworkReward)
        }
        self.turns = turns == "always" or (turns == "auto" and not _fit(networks.values(), device))
        self._waiting = networks if self.turns else {}
        if self._waiting:
            log.info("%d networks take turns on %s", len(networks), device)

    def begin(self, pairs: ScoreBatch) -> None:
        """Score what needs no turn; for the rest keep the squares alone and let the pictures go."""
        pairs.scores = np.full((len(pairs.texts), len(self.rewards)), np.nan, np.float32)
        for column, reward in enumerate(self.rewards):
            if column not in self._waiting:
                pairs.scores[:, column] = pairs.column(reward)
        views = {network.view for network in self._waiting.values()}
        for view in views:
            if view is not None:
                pairs.pictures.preprocessed(view)
        if views and None not in views:
            pairs.pictures.release()

    def finish(self, batches: Sequence[ScoreBatch]) -> None:
        """Score what waits for its turn: each network comes once, for all of these batches."""
        for column, network in self._waiting.items():
            for pairs in batches:
                pairs.scores[:, column] = pairs.column(network)
            network.offload_to_cpu()


def _fit(networks: Collection[NetworkReward], device: torch.device) -> bool:
    """Whether the device has room for all networks' weights at once."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(network.bytes for network in networks) <= SHARE * free
