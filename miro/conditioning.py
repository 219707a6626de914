"""Reward conditioning: raw scores to bins and quantile levels, dropout, and inference targets.

A score s_r is fed as its quantile level: K equal-population bins per reward, bin k as k / (K − 1)
(MIRO, arXiv 2510.25897, section 3). Missing, NaN and dropped scores are all masked, so
one network samples with any subset of the rewards, and with none is its own baseline.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from miro.utils.serialize import unknown_name


@dataclass(frozen=True)
class ConditioningConfig:
    """Rewards to condition on, their binning, and dropout rates."""

    rewards: tuple[str, ...] | None = None
    """The rewards the network is conditioned on. None: all of `reward_slots`; (): the baseline."""
    reward_slots: tuple[str, ...] | None = None
    """The rewards the network has parameters for, so that runs that differ in `rewards` share one
    architecture. None: all of the dataset's. A slot the dataset has no scores for is masked."""
    bins: int = 64
    binning: Literal["quantile", "equal_width"] = "quantile"
    """`quantile`: bins of equal population (the paper's choice); `equal_width`: of equal width."""
    drop_one: float = 0.0
    """Probability of dropping a reward, independently of the others."""
    drop_all: float = 0.1
    """Probability of dropping all rewards of a sample together."""
    drop_text: float = 0.1
    """Probability of dropping a sample's caption, which makes text guidance possible."""

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"conditioning.bins must be at least 2, got {self.bins}")
        for name in ("drop_one", "drop_all", "drop_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"conditioning.{name} is a probability from 0 to 1, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Bins:
    """Bin edges of each reward, fitted once on the dataset's scores and saved as bins.json.

    A score is in bin k if k edges are at or below it. Scores outside the fitted range are thus in
    the first or last bin, and equal scores share one.
    """

    edges: Mapping[str, tuple[float, ...]]
    """The K − 1 inner edges of each reward, ascending."""

    @property
    def rewards(self) -> tuple[str, ...]:
        """Reward names, in the order of the score columns."""
        return tuple(self.edges)

    @property
    def count(self) -> int:
        """Bins per reward (K)."""
        return len(next(iter(self.edges.values()))) + 1 if self.edges else 2

    @classmethod
    def fit(
        cls,
        scores: np.ndarray,
        rewards: Sequence[str],
        count: int,
        binning: str = "quantile",
        optional: Collection[str] = (),
    ) -> Bins:
        """Fit the edges.

        Args:
            scores: (rows, R) raw scores; non-finite ones are left out.
            rewards: names of the R columns.
            count: bins per reward.
            binning: as `ConditioningConfig.binning`.
            optional: rewards that may have no score at all.

        Raises:
            ValueError: a reward that is not `optional` has no finite score.
        """
        edges = {}
        for name, column in zip(rewards, scores.T, strict=True):
            known = np.sort(column[np.isfinite(column)])
            if not len(known) and name in optional:
                known = np.zeros(1)  # arbitrary edges: no score will be binned
            if not len(known):
                raise ValueError(
                    f"reward {name!r} has no known score in the data; annotate it, or leave it out "
                    "with conditioning.rewards"
                )
            if binning == "equal_width":
                inner = np.linspace(known[0], known[-1], count + 1)[1:-1]
            else:
                # The lower edge of a bin is its first score, so populations differ by at most 1.
                inner = known[np.arange(1, count) * len(known) // count]
            edges[name] = tuple(float(edge) for edge in inner)
        return cls(edges)

    def assign(self, scores: np.ndarray) -> tuple[Tensor, Tensor]:
        """Bin raw scores (rows, R).

        Returns:
            (rows, R) int64 bins, 0 where the score is not finite, and (rows, R) bool, whether it is
            finite.
        """
        known = np.isfinite(scores)
        bins = np.zeros(scores.shape, np.int64)
        for column, (name, inner) in enumerate(self.edges.items()):
            values = np.where(known[:, column], scores[:, column], 0)
            bins[:, column] = np.searchsorted(np.asarray(inner), values, side="right")
            assert bins[:, column].max(initial=0) <= len(inner), name
        bins[~known] = 0
        return torch.from_numpy(bins), torch.from_numpy(known)

    def quantile_levels(self) -> Tensor:
        """(K,) quantile level of each bin: k / (K − 1)."""
        return torch.arange(self.count) / (self.count - 1)

    def to_json(self) -> str:
        """The contents of bins.json."""
        return json.dumps({"version": 1, "edges": {k: list(v) for k, v in self.edges.items()}})

    @classmethod
    def from_json(cls, text: str, source: Path | str) -> Bins:
        """Parse the contents of bins.json.

        Raises:
            ValueError: not what `to_json` writes; the message names `source`.
        """
        try:
            record = json.loads(text)
            if record["version"] != 1:
                raise ValueError(f"version {record['version']}")
            edges = {name: tuple(map(float, inner)) for name, inner in record["edges"].items()}
            if len({len(inner) for inner in edges.values()}) > 1:
                raise ValueError("its rewards have different numbers of bins")
            if any(list(inner) != sorted(inner) for inner in edges.values()):
                raise ValueError("its edges are not ascending")
            return cls(edges)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} is not a bins file of this version: {error}") from error


def conditioned_rewards(config: ConditioningConfig, available: Sequence[str]) -> Tensor:
    """(R,) bool mask over `available`: the rewards that the run conditions on.

    Raises:
        ValueError: the configuration names a reward that is not available.
    """
    names = tuple(available) if config.rewards is None else config.rewards
    for name in names:
        if name not in available:
            raise unknown_name("reward of the data", name, available)
    return torch.tensor([name in names for name in available], dtype=torch.bool)


def keep_rewards(
    config: ConditioningConfig, known: Tensor, active: Tensor, uniform: Tensor
) -> Tensor:
    """Reward dropout.

    Args:
        config: dropout rates.
        known: (B, R) bool, whether a score is finite.
        active: (R,) bool, from `conditioned_rewards`.
        uniform: (B, R + 1) numbers in [0, 1): one per reward, then one for all of them together.

    Returns:
        (B, R) bool mask of the rewards that condition each sample.
    """
    keep_one, keep_all = uniform[:, :-1] >= config.drop_one, uniform[:, -1:] >= config.drop_all
    return known & active & keep_one & keep_all


def keep_text(config: ConditioningConfig, uniform: Tensor) -> Tensor:
    """Text dropout: (B,) bool mask of the samples that keep their caption; uniform (B,)."""
    return uniform >= config.drop_text


@dataclass(frozen=True)
class RewardTarget:
    """Reward conditions at inference: s⁺ or s⁻ of equation 3 (arXiv 2510.25897)."""

    levels: tuple[float | None, ...]
    """A quantile level in [0, 1] per reward; None leaves the reward unconditioned."""

    @classmethod
    def from_dict(
        cls, rewards: Sequence[str], levels: Mapping[str, float | None], default: float | None
    ) -> RewardTarget:
        """A target with `levels` by reward name, and `default` for the others.

        Raises:
            ValueError: an unknown reward, or a level outside 0 to 1.
        """
        for name in levels:
            if name not in rewards:
                raise unknown_name("reward of this model", name, rewards)
        levels = {name: levels.get(name, default) for name in rewards}
        for name, level in levels.items():
            if level is not None and not 0 <= level <= 1:
                raise ValueError(
                    f"the target of {name} must be from 0 (worst of the data) to 1 (best), "
                    f"got {level}"
                )
        return cls(tuple(levels.values()))
