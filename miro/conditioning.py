"""From raw reward scores to what the network is told: bins, unknown scores, dropout and targets.

A reward is fed as its rank among the data: K equal-population bins, bin k as the level k / (K − 1)
(MIRO, arXiv 2510.25897, section 3). A score that is missing or NaN is "not known", which is what
reward dropout makes of known ones too, so one network serves with any subset of rewards, and with
none as its own baseline.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from miro.utils.serialize import unknown_name


@dataclass(frozen=True)
class ConditioningConfig:
    """Which rewards a run trains on, how they are binned, and how often each is withheld."""

    rewards: tuple[str, ...] | None = None
    """The rewards the network is told. None: all it has a place for; none at all: the baseline."""
    reward_slots: tuple[str, ...] | None = None
    """The rewards the network has a place for, told or not, so that runs of different `rewards`
    build the same network. None: all the data has. What the data does not have is not known."""
    bins: int = 64
    bin_law: Literal["population", "width"] = "population"
    """`population`: as many samples in each bin; `width`: bins of equal width."""
    drop_one: float = 0.0
    """Probability that a reward is withheld, independently of the others."""
    drop_all: float = 0.1
    """Probability that all rewards of a sample are withheld together."""
    drop_text: float = 0.1
    """Probability that a sample's caption is withheld: it makes text guidance possible."""

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
    """The inner bin edges of each reward, fitted once over all scores; saved as bins.json.

    A score falls into bin k when k edges are at or below it, so scores beyond those the edges were
    fitted on fall into the first or last bin. Equal scores always share a bin; a constant reward
    puts all its scores in one.
    """

    edges: Mapping[str, tuple[float, ...]]

    @property
    def rewards(self) -> tuple[str, ...]:
        return tuple(self.edges)

    @property
    def count(self) -> int:
        """Bins of a reward, the same for all."""
        return len(next(iter(self.edges.values()))) + 1 if self.edges else 2

    @classmethod
    def fit(
        cls,
        scores: np.ndarray,
        rewards: Sequence[str],
        count: int,
        law: str = "population",
        optional: Collection[str] = (),
    ) -> Bins:
        """Fit to raw scores (rows, R); NaN rows of a reward are left out of its fit.

        Raises:
            ValueError: a reward that is not `optional` has no known score at all.
        """
        edges = {}
        for name, column in zip(rewards, scores.T, strict=True):
            known = np.sort(column[np.isfinite(column)])
            if not len(known) and name in optional:
                known = np.zeros(1)  # any edges will do: there is nothing to put between them
            if not len(known):
                raise ValueError(
                    f"reward {name!r} has no known score in the data; annotate it, or leave it out "
                    "with conditioning.rewards"
                )
            if law == "width":
                inner = np.linspace(known[0], known[-1], count + 1)[1:-1]
            else:
                # The first score of each bin is its lower edge: exact to one sample a bin.
                inner = known[np.arange(1, count) * len(known) // count]
            edges[name] = tuple(float(edge) for edge in inner)
        return cls(edges)

    def assign(self, scores: np.ndarray) -> tuple[Tensor, Tensor]:
        """Raw scores (rows, R) to bins (rows, R) uint8-sized int64 and which are known, bool.

        The bin of an unknown score is 0 and means nothing.
        """
        known = np.isfinite(scores)
        bins = np.zeros(scores.shape, np.int64)
        for column, (name, inner) in enumerate(self.edges.items()):
            values = np.where(known[:, column], scores[:, column], 0)
            bins[:, column] = np.searchsorted(np.asarray(inner), values, side="right")
            assert bins[:, column].max(initial=0) <= len(inner), name
        bins[~known] = 0
        return torch.from_numpy(bins), torch.from_numpy(known)

    def levels(self) -> Tensor:
        """(K,) the level each bin is fed as: k / (K − 1)."""
        return torch.arange(self.count) / (self.count - 1)

    def to_json(self) -> str:
        return json.dumps({"version": 1, "edges": {k: list(v) for k, v in self.edges.items()}})

    @classmethod
    def from_json(cls, text: str, source: Path | str) -> Bins:
        """Raises ValueError naming `source` where the text is not what to_json writes."""
        try:
            record = json.loads(text)
            if record["version"] != 1:
                raise ValueError(f"version {record['version']}")
            edges = {name: tuple(map(float, inner)) for name, inner in record["edges"].items()}
            if len({len(inner) for inner in edges.values()}) > 1:
                raise ValueError("its rewards have different numbers of bins")
            if any(list(inner) != sorted(inner) for inner in edges.values()):
                raise ValueError("its edges do not rise")
            return cls(edges)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} is not a bins file of this version: {error}") from error


def conditioned_rewards(config: ConditioningConfig, available: Sequence[str]) -> Tensor:
    """(R,) bool: which of the data's rewards the run is told.

    Raises:
        ValueError: the configuration names a reward the data does not have.
    """
    names = tuple(available) if config.rewards is None else config.rewards
    for name in names:
        if name not in available:
            raise unknown_name("reward of the data", name, available)
    return torch.tensor([name in names for name in available], dtype=torch.bool)


def keep_rewards(
    config: ConditioningConfig, known: Tensor, trained: Tensor, uniform: Tensor
) -> Tensor:
    """(B, R) bool: the rewards each sample of a training batch is told, after dropout.

    uniform: (B, R + 1) numbers in [0, 1), one for each reward and one for all together.
    """
    alone, together = uniform[:, :-1] >= config.drop_one, uniform[:, -1:] >= config.drop_all
    return known & trained & alone & together


def keep_text(config: ConditioningConfig, uniform: Tensor) -> Tensor:
    """(B,) bool: the samples of a training batch that keep their caption, from (B,) in [0, 1)."""
    return uniform >= config.drop_text


@dataclass(frozen=True)
class RewardTarget:
    """Levels asked for at inference: one in [0, 1] a reward, or None where nothing is asked."""

    levels: tuple[float | None, ...]

    @classmethod
    def of(
        cls, rewards: Sequence[str], wanted: Mapping[str, float | None], default: float | None
    ) -> RewardTarget:
        """`default` for every reward, but what `wanted` says for those it names.

        Raises:
            ValueError: an unknown reward, or a level outside 0 to 1.
        """
        for name in wanted:
            if name not in rewards:
                raise unknown_name("reward of this model", name, rewards)
        levels = {name: wanted.get(name, default) for name in rewards}
        for name, level in levels.items():
            if level is not None and not 0 <= level <= 1:
                raise ValueError(
                    f"the target of {name} must be from 0 (worst of the data) to 1 (best), "
                    f"got {level}"
                )
        return cls(tuple(levels.values()))

    def mix(self, other: RewardTarget, share: float) -> RewardTarget:
        """The target a `share` of the way to `other`; both must ask for the same rewards."""
        if not 0 <= share <= 1:
            raise ValueError(f"the share of a mix must be from 0 to 1, got {share}")
        pairs = zip(self.levels, other.levels, strict=True)
        return replace(self, levels=tuple(_mix(a, b, share) for a, b in pairs))


def _mix(a: float | None, b: float | None, share: float) -> float | None:
    if (a is None) != (b is None):
        raise ValueError("two targets can be mixed only where both ask for the same rewards")
    return None if a is None or b is None else a + share * (b - a)
