"""`miro inspect`: the statistics of a dataset folder as one HTML page and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miro.data.shards import MODELS, Manifest, scores_path
from miro.inspect.contact_sheets import contact_sheets, why_no_images
from miro.inspect.rejected_counts import read_rejected
from miro.inspect.sample_stats import read_sample_stats
from miro.inspect.score_stats import (
    argsort_scores,
    correlation,
    dense_ranks,
    read_score_columns,
    reward_stats,
)
from miro.inspect.summary import DatasetSummary, RewardStats
from miro.utils.atomic_io import write_text
from miro.utils.progress import ProgressCallback


@dataclass(frozen=True)
class InspectConfig:
    """Options of `inspect`."""

    images: int = 24  # on a contact sheet; 0 for none
    bins: int = 64  # quantile bins whose edges are marked, as conditioning.bins of a training
    max_samples: int = 20_000  # whose captions and sizes are read; scores are read of all

    def __post_init__(self) -> None:
        for name, least in (("images", 0), ("bins", 2), ("max_samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def inspect(
    folder: Path,
    out: Path | None = None,
    *,
    config: InspectConfig | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write the page of a dataset, and its statistics as JSON beside it.

    Args:
        folder: The dataset folder.
        out: Path of the page; FOLDER/inspect.html if None.
        config: How many samples to read and to show.
        progress: Called for each score table.

    Returns:
        The path of the page.

    Raises:
        ValueError: `folder` is not a dataset or has no samples, a shard or score table is missing
            or damaged, or `out` does not end in .html.
    """
    folder, config = Path(folder), config or InspectConfig()
    out = folder / "inspect.html" if out is None else Path(out)
    if out.suffix != ".html":
        raise ValueError(f"{out}: the page's name must end in .html")
    # Imported late: matplotlib would delay `miro --help`.
    from miro.inspect.inspect_page import write_inspect_page

    summary = summarize_dataset(folder, config, progress or (lambda done, total: None))
    write_text(out.with_suffix(".json"), json.dumps(summary.to_json(), indent=1))
    return write_inspect_page(out, summary)


def summarize_dataset(
    folder: Path, config: InspectConfig, progress: ProgressCallback
) -> DatasetSummary:
    """Compute the statistics that `inspect` shows; raises the same errors."""
    manifest = Manifest.read(folder)
    if not manifest.samples:
        stage = "annotate" if manifest.kind == "images" else "encode"
        raise ValueError(f"{folder} holds no samples yet; let `miro {stage}` complete a shard")
    scored = bool(manifest.rewards) or all(
        scores_path(folder, shard).is_file() for shard in manifest.shards
    )
    columns = read_score_columns(folder, manifest, progress) if scored else None
    rewards: list[RewardStats] = []
    ranks: dict[str, np.ndarray] = {}
    extremes: dict[tuple[str, str], np.ndarray] = {}
    count = config.images * len(manifest.captions)  # a sample has at most a pair per caption type
    for name, column in columns.values.items() if columns else ():
        order = argsort_scores(column)
        stats = reward_stats(name, column, order, config.bins, _model_of(manifest, name))
        rewards.append(stats)
        ranks[name] = dense_ranks(column, order)
        if stats.distinct > 1 and count:
            ends = {"best": order[::-1][:count], "worst": order[:count]}
            extremes |= {(name, end): pairs.copy() for end, pairs in ends.items()}
    return DatasetSummary(
        name=folder.resolve().name,
        kind=manifest.kind,
        samples=manifest.samples,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        pairs=int(columns.starts[-1]) if columns else None,
        bins=config.bins,
        sample_stats=read_sample_stats(folder, manifest, config.max_samples),
        rewards=tuple(rewards),
        correlation=correlation(ranks) if len(ranks) > 1 else None,
        rejected=read_rejected(folder / "rejected.jsonl"),
        encoding=manifest.encoding or {},
        sheets=contact_sheets(folder, manifest, columns, extremes, config.images)
        if columns
        else (),
        no_images=why_no_images(manifest),
    )


def _model_of(manifest: Manifest, reward: str) -> str | None:
    models = manifest.source.get(MODELS)
    model = models.get(reward) if isinstance(models, dict) else None
    return None if model is None else str(model)
