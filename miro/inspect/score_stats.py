"""The scores of a whole dataset in numbers: one pass over the files, then columns in memory.

Of n pairs a column takes 4n bytes, and so do its ranks; 16 M pairs and seven rewards need 0.9 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miro.conditioning import Bins
from miro.data.shards import Manifest, read_shard_scores, scores_path
from miro.inspect.summary import Correlation, RewardNumbers

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
BARS = 60  # of a histogram; fewer where the scores are few
BEYOND = 1000  # one in so many at either end may lie beyond the bars, so that the rest is seen


@dataclass(frozen=True)
class Columns:
    """Scores of a dataset as columns.

    Attributes:
        starts: Index of the first pair of each shard, and the number of pairs at the end.
        values: float32 (pairs,) by reward; NaN where a score is missing.
    """

    starts: np.ndarray
    values: Mapping[str, np.ndarray]


def read_columns(
    folder: Path, manifest: Manifest, progress: Callable[[int, int | None], None]
) -> Columns:
    """The scores of all shards; ValueError where a shard has no file of them, or lacks a column."""
    starts, done = [0], 0
    parts: dict[str, list[np.ndarray]] = {name: [] for name in manifest.rewards}
    for shard in manifest.shards:
        path = scores_path(folder, shard)
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run `miro annotate {folder} {folder}` first")
        keys, _, columns = read_shard_scores(path)
        for name, found in parts.items():
            if name not in columns:
                raise ValueError(f"{path}: no column {name!r}; run `miro annotate` to add it")
            known = np.isfinite(columns[name])
            found.append(np.where(known, columns[name], np.float32(np.nan)))
        starts.append(starts[-1] + len(keys))
        done += shard.samples
        progress(done, manifest.samples)
    values = {name: np.concatenate(parts.pop(name)) for name in manifest.rewards}
    return Columns(np.array(starts), values)


def order_of(column: np.ndarray) -> np.ndarray:
    """The pairs whose score is known, from the lowest to the highest; equal scores as they lie."""
    known = len(column) - np.count_nonzero(np.isnan(column))
    return np.argsort(column, kind="stable")[:known]  # NaN comes last


def reward_numbers(
    name: str, column: np.ndarray, order: np.ndarray, bins: int, model: str | None = None
) -> RewardNumbers:
    """A column, float32 (pairs,) NaN where not known, in numbers; `order` is its `order_of`."""
    known, unknown = len(order), len(column) - len(order)
    if not known:
        return RewardNumbers(name, model, 0, unknown, distinct=0, bins_used=0)
    rising = column[order]
    distinct = 1 + int(np.count_nonzero(rising[1:] != rising[:-1]))
    edges = Bins.fit(rising[:, None], (name,), bins).edges[name]
    # An edge is the first score of a bin; before the first edge there may be none.
    used = len(set(edges)) + bool(rising[0] < edges[0])
    low, high = rising[known // BEYOND], rising[known - 1 - known // BEYOND]
    if low == high:
        low, high = rising[0], rising[-1]
    count = int(min(BARS, max(8, 2 * known**0.5)))
    bars, bar_edges = np.histogram(rising, count if low < high else 1, range=(low, high))
    return RewardNumbers(
        name,
        model,
        known,
        unknown,
        distinct,
        used,
        mean=float(rising.mean(dtype=np.float64)),
        quantiles={str(q): float(rising[round(q * (known - 1))]) for q in QUANTILES},
        bin_edges=edges,
        bar_edges=tuple(bar_edges.tolist()),
        bars=tuple(bars.tolist()),
        below=int(np.count_nonzero(rising < low)),
        above=int(np.count_nonzero(rising > high)),
    )


def dense_ranks(column: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int32 (pairs,): 0 for the lowest score, equal scores equal, no gaps; −1 where not known."""
    rising = column[order]
    ranks = np.full(len(column), -1, np.int32)
    ranks[order[:1]] = 0
    ranks[order[1:]] = np.cumsum(rising[1:] != rising[:-1], dtype=np.int32)
    return ranks


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float | None, int]:
    """Spearman's ρ of two `dense_ranks` over the pairs known in both, and their number.

    Ties have the mean of their ranks. None where there are fewer than two pairs or one is constant.
    """
    both = (a >= 0) & (b >= 0)
    count = int(np.count_nonzero(both))
    if count < 2:
        return None, count
    x, y = (_centred_ranks(ranks[both]) for ranks in (a, b))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return (float(x @ y) / size if size else None), count


def _centred_ranks(dense: np.ndarray) -> np.ndarray:
    """float64 ranks among these alone, ties averaged, minus their mean. Needs no sort."""
    counts = np.bincount(dense)
    last = np.cumsum(counts)  # the rank, from 1, of the last of each
    mean = (len(dense) + 1) / 2
    return (last - (counts - 1) / 2 - mean)[dense]


def correlation(ranks: Mapping[str, np.ndarray]) -> Correlation:
    """The `rank_correlation` of every two rewards, by their `dense_ranks`."""
    names = tuple(ranks)
    values: list[list[float | None]] = [[None] * len(names) for _ in names]
    pairs = [[0] * len(names) for _ in names]
    for i, first in enumerate(names):
        for j in range(i + 1):
            values[i][j], pairs[i][j] = rank_correlation(ranks[first], ranks[names[j]])
            values[j][i], pairs[j][i] = values[i][j], pairs[i][j]
    return Correlation(names, tuple(map(tuple, values)), tuple(map(tuple, pairs)))
