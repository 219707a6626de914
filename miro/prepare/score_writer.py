"""Writer of the score table of one shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from miro.data.shards import read_shard_scores, write_scores
from miro.sources.sample import RawSample
from miro.utils.reward_names import reward_position


class ScoreWriter:
    """Collects the scores of a shard's samples, one row per caption.

    Args:
        rewards: Names of the columns.

    Attributes:
        captions: Caption type of each row so far.
    """

    def __init__(self, rewards: Sequence[str]) -> None:
        self.captions: list[str] = []
        self._rewards = tuple(rewards)
        self._keys: list[str] = []
        self._scores = [np.empty((0, len(self._rewards)), np.float32)]

    def add(self, sample: RawSample, scores: np.ndarray) -> None:
        """Append a sample's scores, float32 (captions, rewards), NaN where missing."""
        self._keys += [sample.key] * len(sample.captions)
        self.captions += sample.captions
        self._scores.append(scores)

    def write(self, path: Path) -> None:
        """Write the table atomically, in place of any other."""
        self._write(path, self._columns())

    def write_columns(self, path: Path) -> None:
        """Add the columns to the table at `path` if there is one; ValueError if its rows differ."""
        existing: dict[str, np.ndarray] = {}
        if path.is_file():
            keys, captions, existing = read_shard_scores(path)
            if (keys, captions) != (self._keys, self.captions):
                raise ValueError(f"{path}: has rows of other samples; delete it and run again")
        self._write(path, existing | self._columns())

    def _columns(self) -> dict[str, np.ndarray]:
        values = np.concatenate(self._scores)
        return {name: values[:, i] for i, name in enumerate(self._rewards)}

    def _write(self, path: Path, columns: dict[str, np.ndarray]) -> None:
        ordered = {name: columns[name] for name in sorted(columns, key=reward_position)}
        write_scores(path, self._keys, self.captions, ordered)
