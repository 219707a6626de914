"""Scoring of decoded batches by several rewards, with optional model offloading.

If the networks of all rewards fit in device memory, every reward scores each batch as it arrives.
Otherwise a window of batches is decoded and preprocessed first, then one network after the other is
loaded to the device and scores the whole window: no image is decoded twice.
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
MAX_WEIGHTS_FRACTION = 0.7
"""Fraction of free device memory that weights may occupy; activations need the rest."""


class ScoreBatch:
    """Decoded images, the captions of each by caption type, and the scores of every pair.

    Attributes:
        images: The images.
        texts: The caption of each pair.
        rows: int64 (pairs,), the image of each pair.
        scores: float32 (pairs, rewards); NaN where undefined.
    """

    def __init__(self, images: Sequence[Tensor], captions: Sequence[Mapping[str, str]]) -> None:
        assert len(images) == len(captions)
        self._counts = [len(by_type) for by_type in captions]
        self.rows = np.repeat(np.arange(len(images)), self._counts)
        self.texts = [text for by_type in captions for text in by_type.values()]
        self._first_texts = [next(iter(by_type.values())) for by_type in captions]
        self.images = ImageBatch(images)
        self.scores = np.empty((len(self.rows), 0), np.float32)

    def by_image(self) -> list[np.ndarray]:
        """The scores of each image, float32 (its captions, rewards)."""
        return np.split(self.scores, np.cumsum(self._counts)[:-1]) if self._counts else []

    def column(self, reward: Reward) -> np.ndarray:
        """Scores of all pairs by one reward, float32 (pairs,); non-finite scores become NaN.

        Raises:
            ValueError: The reward returned a tensor of another shape.
        """
        if not self.texts:
            return np.empty(0, np.float32)
        if reward.reads_caption:
            images, texts = self.images.take(self.rows), self.texts
        else:
            images, texts = self.images, self._first_texts
        found = reward.score(images, texts)
        if tuple(found.shape) != (len(texts),):
            raise ValueError(
                f"reward {reward.name!r} returned scores of shape {tuple(found.shape)} for "
                f"{len(texts)} pairs"
            )
        values = found.detach().float().cpu().numpy()
        values = values.copy() if reward.reads_caption else values[self.rows]
        values[~np.isfinite(values)] = np.nan
        return values


class Scorer:
    """Fills `ScoreBatch.scores`, one column per reward.

    Args:
        rewards: The rewards, in the order of the columns.
        device: The device of their networks.
        offload: Whether to load networks one at a time; "auto" does so if they do not all fit.

    Attributes:
        offloads: Whether networks are loaded one at a time.
    """

    def __init__(
        self, rewards: Sequence[Reward], device: torch.device, offload: Offload = "auto"
    ) -> None:
        self.rewards = list(rewards)
        networks = {
            column: reward
            for column, reward in enumerate(self.rewards)
            if isinstance(reward, NetworkReward)
        }
        self.offloads = offload == "always" or (
            offload == "auto" and not _fit(networks.values(), device)
        )
        self._offloaded = networks if self.offloads else {}
        if self._offloaded:
            log.info("model offloading: %d networks share %s", len(networks), device)

    def begin(self, batch: ScoreBatch) -> None:
        """Score by the resident rewards; for offloaded ones preprocess the images and free them."""
        batch.scores = np.full((len(batch.texts), len(self.rewards)), np.nan, np.float32)
        for column, reward in enumerate(self.rewards):
            if column not in self._offloaded:
                batch.scores[:, column] = batch.column(reward)
        transforms = {network.transform for network in self._offloaded.values()}
        for transform in transforms:
            if transform is not None:
                batch.images.preprocessed(transform)
        if transforms and None not in transforms:
            batch.images.release()

    def finish(self, batches: Sequence[ScoreBatch]) -> None:
        """Score by the offloaded rewards: each network is loaded once for all batches."""
        for column, network in self._offloaded.items():
            for batch in batches:
                batch.scores[:, column] = batch.column(network)
            network.offload_to_cpu()


def _fit(networks: Collection[NetworkReward], device: torch.device) -> bool:
    """Whether the weights of all networks fit in device memory at once."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(network.num_bytes for network in networks) <= MAX_WEIGHTS_FRACTION * free
