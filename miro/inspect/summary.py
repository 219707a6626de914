"""The statistics of a dataset that `miro inspect` shows, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RewardStats:
    """Scores of one reward over all (image, caption) pairs."""

    name: str
    model: str | None  # that computed the scores, None if the manifest does not record it
    scored: int  # pairs with a score
    missing: int  # pairs without one
    distinct: int
    bins_used: int  # non-empty bins; equal scores share one
    mean: float | None = None
    quantiles: Mapping[str, float] = field(default_factory=dict)  # "0.5" -> score, nearest rank
    bin_edges: tuple[float, ...] = ()  # inner edges of quantile bins
    histogram_edges: tuple[float, ...] = ()  # one more than bars
    histogram: tuple[int, ...] = ()  # pairs per bar
    below: int = 0  # outliers below the histogram, at most a thousandth of the pairs
    above: int = 0  # outliers above it


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of rewards, over the pairs that both have scored."""

    rewards: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]  # None if constant, or of fewer than two pairs
    pairs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RejectedStats:
    """Counts of rejected.jsonl by field and reason, without numbers and names."""

    lines: int
    invalid: int  # lines that are not of such a log
    reasons: tuple[tuple[str, str, int], ...]  # (field, reason, lines), most frequent first
    examples: tuple[tuple[str, str, str], ...]  # (source, field, reason) of the first lines


@dataclass(frozen=True)
class SampleStats:
    """Captions and image sizes of all samples, or of some of each shard."""

    samples: int
    complete: bool  # whether these are all samples
    caption_types: Mapping[str, int]  # captions by type
    without_caption: int  # samples without a valid caption
    captions: int
    distinct: int
    mean_length: float  # characters
    max_length: int
    sizes: Mapping[str, int] = field(default_factory=dict)  # "640 × 480" -> images, most first
    shorter_side: Mapping[str, float] = field(default_factory=dict)  # quantile -> pixels
    aspect_ratio: Mapping[str, float] = field(default_factory=dict)  # quantile -> width / height
    without_image: int = 0  # samples without an image with a readable header


@dataclass(frozen=True)
class SheetSample:
    """A sample on a contact sheet, with its best or worst caption."""

    key: str
    caption_type: str
    caption: str
    score: float


@dataclass(frozen=True)
class ContactSheet:
    """The best or worst samples by a reward, as one JPEG; empty if no image can be shown."""

    reward: str
    end: str  # "best" or "worst"
    samples: tuple[SheetSample, ...]
    skipped: tuple[str, ...] = ()  # keys and reasons of images that could not be decoded
    columns: int = 0
    jpeg: bytes = b""


@dataclass(frozen=True)
class DatasetSummary:
    """All statistics of a dataset folder."""

    name: str
    kind: str
    samples: int
    shards: int
    bytes: int
    pairs: int | None  # rows of the score tables, None if there are none
    bins: int
    sample_stats: SampleStats
    rewards: tuple[RewardStats, ...] = ()
    correlation: Correlation | None = None
    rejected: RejectedStats | None = None
    encoding: Mapping[str, Any] = field(default_factory=dict)
    sheets: tuple[ContactSheet, ...] = ()
    no_images: str = ""  # the reason why no images can be shown

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON types, without the JPEGs."""
        record = asdict(self)
        for sheet in record["sheets"]:
            del sheet["jpeg"], sheet["columns"]
        return record
