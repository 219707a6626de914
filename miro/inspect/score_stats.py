"""Statistics of the scores of a whole dataset, held as columns in memory.

A column of n pairs takes 4n bytes, and so do its ranks: 0.9 GB for 16 M pairs and seven rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miro.conditioning import Bins
from miro.data.shards import Manifest, read_shard_scores, scores_path
from miro.inspect.summary import Correlation, RewardStats
from miro.utils.progress import ProgressCallback

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
MAX_BARS = 60  # of a histogram
OUTLIERS = 1000  # at either end 1 of so many scores may lie outside the histogram


@dataclass(frozen=True)
class ScoreColumns:
    """Scores of a dataset as columns.

    Attributes:
        starts: Index of the first pair of each shard, and the number of pairs at the end.
        values: float32 (pairs,) by reward; NaN where a score is missing.
    """

    starts: np.ndarray
    values: Mapping[str, np.ndarray]


def read_score_columns(
    folder: Path, manifest: Manifest, progress: ProgressCallback
) -> ScoreColumns:
    """Read the scores of all shards; ValueError for a shard without a table or a column."""
    starts, done = [0], 0
    parts: dict[str, list[np.ndarray]] = {name: [] for name in manifest.rewards}
    for shard in manifest.shards:
        path = scores_path(folder, shard)
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run `miro annotate {folder} {folder}` first")
        keys, _, columns = read_shard_scores(path)
        for name, part in parts.items():
            if name not in columns:
                raise ValueError(f"{path}: no column {name!r}; run `miro annotate` to add it")
            finite = np.isfinite(columns[name])
            part.append(np.where(finite, columns[name], np.float32(np.nan)))
        starts.append(starts[-1] + len(keys))
        done += shard.samples
        progress(done, manifest.samples)
    values = {name: np.concatenate(parts.pop(name)) for name in manifest.rewards}
    return ScoreColumns(np.array(starts), values)


def argsort_scores(column: np.ndarray) -> np.ndarray:
    """The pairs that have a score, in ascending order of it, stable; int64."""
    scored = len(column) - np.count_nonzero(np.isnan(column))
    return np.argsort(column, kind="stable")[:scored]  # numpy sorts NaN last


def reward_stats(
    name: str, column: np.ndarray, order: np.ndarray, bins: int, model: str | None = None
) -> RewardStats:
    """Compute the statistics of one reward.

    Args:
        name: The reward.
        column: float32 (pairs,), NaN where a score is missing.
        order: `argsort_scores` of the column.
        bins: Number of quantile bins.
        model: That computed the scores.
    """
    scored, missing = len(order), len(column) - len(order)
    if not scored:
        return RewardStats(name, model, 0, missing, distinct=0, bins_used=0)
    ascending = column[order]
    distinct = 1 + int(np.count_nonzero(ascending[1:] != ascending[:-1]))
    edges = Bins.fit(ascending[:, None], (name,), bins).edges[name]
    # An edge is the lowest score of its bin; the bin below the first edge may be empty.
    used = len(set(edges)) + bool(ascending[0] < edges[0])
    low, high = ascending[scored // OUTLIERS], ascending[scored - 1 - scored // OUTLIERS]
    if low == high:
        low, high = ascending[0], ascending[-1]
    bars = int(min(MAX_BARS, max(8, 2 * scored**0.5)))
    histogram, histogram_edges = np.histogram(
        ascending, bars if low < high else 1, range=(low, high)
    )
    return RewardStats(
        name,
        model,
        scored,
        missing,
        distinct,
        used,
        mean=float(ascending.mean(dtype=np.float64)),
        quantiles={str(q): float(ascending[round(q * (scored - 1))]) for q in QUANTILES},
        bin_edges=edges,
        histogram_edges=tuple(histogram_edges.tolist()),
        histogram=tuple(histogram.tolist()),
        below=int(np.count_nonzero(ascending < low)),
        above=int(np.count_nonzero(ascending > high)),
    )


def dense_ranks(column: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Dense ranks from 0, int32 (pairs,): equal scores share a rank; -1 where one is missing."""
    ascending = column[order]
    ranks = np.full(len(column), -1, np.int32)
    ranks[order[:1]] = 0
    ranks[order[1:]] = np.cumsum(ascending[1:] != ascending[:-1], dtype=np.int32)
    return ranks


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float | None, int]:
    """Spearman's rho of two columns of `dense_ranks`, over the pairs that have both scores.

    Ties get the mean of their ranks.

    Returns:
        rho, None if a column is constant or there are fewer than two pairs; the number of pairs.
    """
    both = (a >= 0) & (b >= 0)
    count = int(np.count_nonzero(both))
    if count < 2:
        return None, count
    x, y = (_centered_ranks(ranks[both]) for ranks in (a, b))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return (float(x @ y) / norm if norm else None), count


def _centered_ranks(dense: np.ndarray) -> np.ndarray:
    """float64 ranks of a subset, ties averaged, minus their mean; computed without a sort."""
    counts = np.bincount(dense)
    last = np.cumsum(counts)  # rank, from 1, of the last pair of each dense rank
    mean = (len(dense) + 1) / 2
    return (last - (counts - 1) / 2 - mean)[dense]


def correlation(ranks: Mapping[str, np.ndarray]) -> Correlation:
    """Compute `rank_correlation` of every two rewards from their `dense_ranks`."""
    names = tuple(ranks)
    values: list[list[float | None]] = [[None] * len(names) for _ in names]
    pairs = [[0] * len(names) for _ in names]
    for i, first in enumerate(names):
        for j in range(i + 1):
            values[i][j], pairs[i][j] = rank_correlation(ranks[first], ranks[names[j]])
            values[j][i], pairs[j][i] = values[i][j], pairs[i][j]
    return Correlation(names, tuple(map(tuple, values)), tuple(map(tuple, pairs)))
